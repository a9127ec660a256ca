// What is wrong with the layout of a page at its present width: text that covers text or is cut off,
// and, for `thumbs`, what is too small to be met by one.
(thumbs) => {
  const found = new Set();
  const isShown = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const words = (text) => text.trim().replace(/\s+/g, " ").slice(0, 40);

  // what is left of a box within all that clips it; null beside what is fixed in front of the page
  function seen(element, { left, top, right, bottom }) {
    for (let at = element; at && at !== document.documentElement; at = at.parentElement) {
      const style = getComputedStyle(at);
      if (style.position === "fixed") return null;
      if (at instanceof SVGElement && at.tagName !== "svg") continue;
      if (style.overflow === "visible" && style.clipPath === "none") continue;
      const box = at.getBoundingClientRect();
      [left, right] = [Math.max(left, box.left), Math.min(right, box.right)];
      [top, bottom] = [Math.max(top, box.top), Math.min(bottom, box.bottom)];
    }
    return right - left < 1 || bottom - top < 2 ? null : { left, top, right, bottom };
  }

  const lines = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    const parent = node.parentElement;
    if (!node.data.trim() || !isShown(parent) || parent.closest("script, style, title, option, textarea, .skip, .cm-editor")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      const box = seen(parent, rect);
      if (!box) continue;
      lines.push({ node, ...box });
      if (box.right > innerWidth + 1) found.add(`beside the page: ${words(node.data)}`);
    }
  }
  lines.sort((a, b) => a.top - b.top);
  lines.forEach((a, n) => {
    for (let m = n + 1; m < lines.length && lines[m].top < a.bottom - 3; m++) {
      const b = lines[m];
      const high = Math.min(a.bottom, b.bottom) - b.top;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (a.node !== b.node && high > 3 && wide > 2) found.add(`on each other: ${words(a.node.data)} / ${words(b.node.data)}`);
    }
  });

  if (thumbs) {
    for (const element of document.querySelectorAll("a, button, input:not([type=hidden]), select, summary")) {
      if (!isShown(element) || element.closest("svg, thead, .skip, .cm-editor")) continue;
      // a link within a sentence is as high as its line, and a row leads where its link leads
      const beside = [...element.parentElement.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && /\w/.test(node.data));
      if (beside && getComputedStyle(element).display === "inline") continue;
      const target = element.matches("td > a") ? element.closest("tr") : element.closest("label") ?? element;
      const { width, height } = target.getBoundingClientRect();
      if (width < 24 || height < 43.5) found.add(`too small: ${words(element.outerHTML)} ${width}x${height}`);
    }
  }
  return [...found];
}

"use strict";
// Zooms and moves a drawing, with buttons, wheel, keyboard, mouse and touch. If it is larger than its
// frame, a small map of it is shown.

function viewport(frame, { width, height, middle }) {
  const drawing = frame.querySelector("svg.drawing");
  const small = frame.querySelector("svg.map");
  const seen = small?.querySelector(".seen");
  let scale = 1;
  let left = 0;
  let top = 0;
  let isMoved = false; // by the user; otherwise the frame decides

  const most = 3;
  const fitting = () => Math.min(frame.clientWidth / width, frame.clientHeight / height, 1);
  const least = () => Math.min(fitting(), 0.2);

  function show() {
    if (!(scale > 0)) return; // a frame without a size; it is shown once it has one
    const wide = frame.clientWidth / scale;
    const high = frame.clientHeight / scale;
    const within = (at, size, whole) =>
      size >= whole ? (whole - size) / 2 : Math.min(Math.max(at, 0), whole - size);
    left = within(left, wide, width);
    top = within(top, high, height);
    drawing.setAttribute("viewBox", `${left} ${top} ${wide} ${high}`);
    const isWhole = wide >= width - 1 && high >= height - 1;
    frame.classList.toggle("part", !isWhole);
    if (seen) {
      small.classList.toggle("hidden", isWhole);
      const box = { x: Math.max(left, 0), y: Math.max(top, 0), width: Math.min(wide, width), height: Math.min(high, height) };
      for (const [key, value] of Object.entries(box)) seen.setAttribute(key, value);
    }
  }

  // keep a point of the frame where it is
  function zoom(factor, x = frame.clientWidth / 2, y = frame.clientHeight / 2) {
    const next = Math.min(Math.max(scale * factor, least()), most);
    left += x / scale - x / next;
    top += y / scale - y / next;
    scale = next;
    isMoved = true;
    show();
  }

  function fit() {
    scale = fitting();
    left = top = 0;
    isMoved = true;
    show();
  }

  function move(x, y) {
    left -= x / scale;
    top -= y / scale;
    isMoved = true;
    show();
  }

  // At first as large as is readable, with the selected or first step in the middle; on a phone all of it,
  // unless it would be too small.
  function start() {
    const wide = frame.clientWidth / width;
    scale = frame.clientWidth < 600
      ? Math.max(fitting(), Math.min(wide, 0.5), 0.35)
      : Math.max(fitting(), Math.min(Math.max(wide, 0.7), 0.85));
    left = (scale * width > frame.clientWidth ? middle.x : width / 2) - frame.clientWidth / scale / 2;
    top = middle.y - frame.clientHeight / scale / 2;
    show();
  }

  function reveal(node) {
    const box = node.getBBox();
    const edge = 20;
    const wide = frame.clientWidth / scale;
    const high = frame.clientHeight / scale;
    left = Math.min(Math.max(left, box.x + box.width + edge - wide), box.x - edge);
    top = Math.min(Math.max(top, box.y + box.height + edge - high), box.y - edge);
    show();
  }

  const at = (event) => {
    const box = frame.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  const pointers = new Map();
  let moved = 0;

  drawing.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    if (!pointers.size) moved = 0;
    pointers.set(event.pointerId, at(event));
  });

  drawing.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    const others = [...pointers].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const [, other] = others[0];
      const distance = ([x, y]) => Math.hypot(x - other[0], y - other[1]) || 1;
      zoom(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      moved = Infinity;
    } else {
      moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (moved > 4) drawing.setPointerCapture(event.pointerId);
      move(now[0] - before[0], now[1] - before[1]);
    }
    pointers.set(event.pointerId, now);
  });

  for (const name of ["pointerup", "pointercancel"]) {
    drawing.addEventListener(name, (event) => pointers.delete(event.pointerId));
  }

  // a drag is not a click; a key clicks without a pointer
  drawing.addEventListener("click", (event) => {
    if (moved > 4 && event.detail) { event.preventDefault(); event.stopPropagation(); }
    moved = 0;
  }, true);
  drawing.addEventListener("dragstart", (event) => event.preventDefault());

  // the wheel scrolls the page, unless the graph is in use
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && !frame.contains(document.activeElement)) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / (event.deltaMode ? 20 : 400)), ...at(event));
  }, { passive: false });

  frame.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), "0": fit,
      ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0),
      ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
    };
    if (!keys[event.key]) return;
    keys[event.key]();
    event.preventDefault();
  });

  frame.addEventListener("focusin", (event) => {
    const link = event.target.closest("a");
    if (link && !pointers.size) reveal(link);
  });

  small?.addEventListener("pointerdown", (event) => {
    const box = small.getBoundingClientRect();
    left = ((event.clientX - box.left) / box.width) * width - frame.clientWidth / scale / 2;
    top = ((event.clientY - box.top) / box.height) * height - frame.clientHeight / scale / 2;
    show();
    event.preventDefault();
  });

  new ResizeObserver(() => (isMoved ? show() : start())).observe(frame);
  start();
  return { in: () => zoom(1.25), out: () => zoom(0.8), fit };
}

"use strict";
// Draws the graph of a sequence. The layout is computed again only if steps or edges have changed.
// If only counts have, their texts are replaced, and the focus stays where it is.

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 210;
  const HEIGHT = 58;
  const LINE = 17; // more for a limit
  let drawn = "";
  let view = null;
  let focus = null; // the element that gets the focus once it is shown

  function element(name, attributes, ...children) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  // a letter may be several characters, such as an emoji or a letter with an accent
  const letters = (text) => Array.from(new Intl.Segmenter().segment(text), ({ segment }) => segment);
  // isolate text that is written from right to left from its surroundings
  const apart = (text) => (/[^\0-\x7f]/.test(text) ? `\u2068${text}\u2069` : text);
  // names that begin alike differ at their ends
  const cut = (all, most) => {
    const first = all.slice(0, Math.ceil(most / 2)).join("").trimEnd();
    return apart(`${first}…${all.slice(all.length - Math.floor(most / 2)).join("").trimStart()}`);
  };
  const short = (text, most) => {
    const all = letters(text);
    return all.length > most ? cut(all, most - 1) : apart(text);
  };
  const high = (node) => HEIGHT + (node.limit ? LINE : 0);

  // Write as much of a text as fits, and all of what ends it: letters differ in width.
  function write(place, text, room, end = "") {
    const key = `${room} ${text}${end}`;
    if (place.dataset.text === key) return;
    place.dataset.text = key;
    place.textContent = apart(text) + end;
    if (place.getComputedTextLength() <= room) return;
    const all = letters(text);
    let most = all.length;
    while (most > 1 && place.getComputedTextLength() > room) {
      most = Math.min(most - 1, Math.floor((most * room) / place.getComputedTextLength()));
      place.textContent = cut(all, most) + end;
    }
  }

  // Where each edge leads. Steps that only goals lead to are drawn separately, with an end of their own.
  function targets(data) {
    const main = new Set(data.nodes.filter((node) => node.first).map((node) => node.name));
    for (const name of main) {
      for (const edge of data.edges) {
        if (edge.from === name && edge.to !== null && !edge.elsewhere) main.add(edge.to);
      }
    }
    return data.edges.map((edge) => {
      if (edge.elsewhere) return `other ${edge.elsewhere}/${edge.to}`;
      if (edge.to !== null) return `step ${edge.to}`;
      return main.has(edge.from) ? "end" : "end apart";
    });
  }

  function layout(data, ends) {
    const graph = new dagre.graphlib.Graph({ multigraph: true });
    graph.setGraph({ rankdir: "TB", nodesep: 24, ranksep: 30, marginx: 20, marginy: 20 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const node of data.nodes) graph.setNode(`step ${node.name}`, { width: WIDTH, height: high(node) });
    data.edges.forEach((edge, n) => {
      const end = ends[n];
      if (!graph.hasNode(end)) {
        const text = edge.elsewhere ? `${edge.elsewhere}/${edge.to}` : "end";
        graph.setNode(end, { width: Math.min(24 + 7 * text.length, WIDTH), height: 26, text });
      }
      graph.setEdge(`step ${edge.from}`, end, { width: 70, height: 16, labelpos: "c" }, `${n}`);
    });
    dagre.layout(graph);
    return graph;
  }

  const path = (points) =>
    points.map(({ x, y }, n) => {
      if (n === 0) return `M${x},${y}`;
      if (n === points.length - 1) return `L${x},${y}`;
      const next = points[n + 1];
      return `Q${x},${y} ${(x + next.x) / 2},${(y + next.y) / 2}`;
    }).join(" ");

  function way(graph, edge, end, n) {
    const { points, x, y } = graph.edge(`step ${edge.from}`, end, `${n}`);
    const line = element("path", {
      class: edge.label ? "way alt" : "way", d: path(points), "marker-end": "url(#arrow)",
    });
    const wide = element("path", { class: "wide", d: path(points) });
    const label = element("text", { class: "label", x, y: y + 4 });
    // the panel of a step lists its edges as well, so the keyboard need not stop at each
    return element("a", { href: edge.url, class: "edge", "data-edge": n, tabindex: -1 }, wide, line, label, element("title", {}));
  }

  function box(graph, node, n) {
    const { x, y } = graph.node(`step ${node.name}`);
    const left = x - WIDTH / 2;
    const top = y - high(node) / 2;
    const names = ["node"];
    if (node.goal) names.push("goal");
    if (node.problem) names.push("wrong");
    const link = element(
      "a", { href: node.url, class: names.join(" "), "data-node": n },
      element("rect", { class: "box", x: left, y: top, width: WIDTH, height: high(node), rx: node.goal ? 18 : 7 }),
      element("text", { class: "step", x: left + 12, y: top + 23 }),
      element("text", { class: "small", x: left + 12, y: top + 43 }),
      element("text", { class: "count", x: left + WIDTH - 12, y: top + 23 }),
      element("text", { class: "failed", x: left + WIDTH - 12, y: top + 43 }),
    );
    if (node.limit) link.append(element("text", { class: "limit", x: left + 12, y: top + 43 + LINE }));
    link.append(element("title", {}));
    return link;
  }

  function fill(svg, data) {
    const set = (found, text) => { if (found.textContent !== text) found.textContent = text; };
    data.nodes.forEach((node, n) => {
      const link = svg.querySelector(`[data-node="${n}"]`);
      const stay = node.stay === "–" ? "" : ` · ${node.stay}`;
      const [count, failed] = [".count", ".failed"].map((name) => link.querySelector(name));
      set(count, node.active);
      set(failed, node.failed && `${node.failed} failed`);
      const room = (beside) => WIDTH - 24 - (beside.textContent ? beside.getComputedTextLength() + 8 : 0);
      write(link.querySelector(".step"), node.name, room(count));
      write(link.querySelector(".small"), node.type, room(failed), stay);
      if (node.limit) write(link.querySelector(".limit"), node.limit, WIDTH - 24);
      const words = `${node.name}, ${node.type}, ${node.active} waiting` +
        (node.failed ? `, ${node.failed} failed` : "") + (node.limit ? `, ${node.limit}` : "") + (node.problem ? ", has a problem" : "");
      set(link.querySelector("title"), words);
      link.setAttribute("href", node.url);
      link.classList.toggle("chosen", node.chosen);
    });
    data.edges.forEach((edge, n) => {
      const link = svg.querySelector(`[data-edge="${n}"]`);
      set(link.querySelector(".label"), [edge.label, edge.times].filter(Boolean).join(" "));
      set(link.querySelector("title"), `${edge.from}, ${edge.label || "next"}: ${edge.times || 0}`);
      link.setAttribute("href", edge.url);
      link.classList.toggle("chosen", edge.chosen);
    });
  }

  function overview(graph, data, ends, width, height) {
    const rect = (name, kind) => {
      const { x, y, width: wide, height: high } = graph.node(name);
      return element("rect", { class: kind, x: x - wide / 2, y: y - high / 2, width: wide, height: high, rx: 8 });
    };
    const steps = graph.nodes().map((name) => rect(name, name.startsWith("step ") ? "step-there" : "end"));
    return element(
      "svg", { class: "map hidden", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
      ...steps, element("rect", { class: "seen" }),
    );
  }

  // above the frame: inside it, they would cover steps
  function showButtons() {
    const bar = document.getElementById("zoom");
    bar.replaceChildren();
    for (const [words, text, work] of [
      ["Zoom in", "+", () => view.in()], ["Zoom out", "−", () => view.out()], ["Fit", "Fit", () => view.fit()],
    ]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      if (words !== text) button.setAttribute("aria-label", words);
      button.addEventListener("click", work);
      bar.append(button);
    }
  }

  // A step or an edge opens beside the graph: the page is fetched under its new address, and the parts
  // that have not changed stay as they are.
  function open(event) {
    const link = event.target.closest("#graph a, .journey .close, .ranges a, #step .ways a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    const url = new URL(link.getAttribute("href"), location.href);
    const here = new URL(location.href);
    if (url.pathname !== here.pathname || url.searchParams.get("sequence") !== here.searchParams.get("sequence")) return;
    event.preventDefault();
    focus = link.closest(".close") ? "graph" : link.closest(".ranges") ? null : "step";
    history.pushState({}, "", url);
    refresh();
  }

  function draw() {
    const place = document.getElementById("graph");
    const source = document.getElementById("graph-data");
    if (!place || !source) return;
    const data = JSON.parse(source.dataset.graph);
    const shape = JSON.stringify([
      data.nodes.map((node) => [node.name, node.type, node.problem, node.limit]),
      data.edges.map((edge) => [edge.from, edge.to, edge.elsewhere, edge.label]),
    ]);
    if (shape !== drawn) {
      const leads = targets(data);
      const graph = layout(data, leads);
      const { width, height } = graph.graph();
      const arrow = element(
        "marker",
        { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
        element("path", { class: "head", d: "M0,0 L8,4 L0,8 z" }),
      );
      const ends = graph.nodes().filter((name) => !name.startsWith("step ")).map((name) => {
        const { x, y, width: wide, text } = graph.node(name);
        return element(
          "g", {},
          element("rect", { class: "end", x: x - wide / 2, y: y - 13, width: wide, height: 26, rx: 13 }),
          element("text", { class: "end-text", x, y: y + 4 }, short(text, 26)),
        );
      });
      const room = place.parentElement.clientWidth; // it is hidden while it is empty
      const scale = Math.min(Math.max(room / width, room < 600 ? 0.35 : 0.7), 1); // see viewport()
      place.style.setProperty("--height", `${Math.ceil(height * scale)}px`);
      place.replaceChildren(element(
        "svg", { class: "drawing" },
        element("defs", {}, arrow),
        ...data.edges.map((edge, n) => way(graph, edge, leads[n], n)),
        ...ends,
        ...data.nodes.map((node, n) => box(graph, node, n)),
      ));
      const map = overview(graph, data, ends, width, height);
      map.style.setProperty("--ratio", width / height);
      place.append(map);
      showButtons();
      const middle = data.nodes.find((node) => node.chosen) ?? data.nodes.find((node) => node.first) ?? data.nodes[0];
      view = viewport(place, { width, height, middle: graph.node(`step ${middle.name}`) });
      drawn = shape;
    }
    fill(place.firstElementChild, data);
  }

  const address = () => location.pathname + location.search;

  // a request that was sent before a click is for another address
  document.addEventListener("htmx:before:request", (event) => {
    if (!isLive(event)) return;
    event.detail.ctx.request.action = address();
    event.detail.ctx.askedFor = address();
  });
  document.addEventListener("htmx:before:swap", (event) => {
    if (!isLive(event) || event.defaultPrevented) return;
    if (event.detail.ctx.askedFor === address()) return;
    event.preventDefault();
    setTimeout(refresh);
  });

  document.addEventListener("click", open);
  window.addEventListener("popstate", () => location.reload());
  document.addEventListener("shown", () => {
    draw();
    if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    focus = null;
  });
  draw();
})();

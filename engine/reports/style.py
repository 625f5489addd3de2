"""The page's style sheet and script. Both are in the page: it needs no network."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1d2125; --soft: #626a73;
  --rule: #e3e5e8;
  --c0: #2166ac; --c1: #d6541c; --c2: #1b8a5a; --c3: #8e44ad;
  --c4: #b8860b; --c5: #0e8c9b; --c6: #c2185b; --c7: #5d6d7e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #9aa3ad;
    --rule: #30363d;
    --c0: #6cb2f5; --c1: #ff8f5c; --c2: #58cf96; --c3: #c792ea;
    --c4: #e8c04f; --c5: #4fd1de; --c6: #ff7fae; --c7: #a8b5c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1320px; padding: 20px 16px 48px;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.45rem; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 32px 0 10px; }
p { margin: 4px 0; }
.soft, .unit { color: var(--soft); }
.note { border-left: 3px solid var(--c4); padding-left: 10px; }
.charts {
  display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
}
figure {
  margin: 0; padding: 10px 10px 6px; position: relative;
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
}
figcaption { font-weight: 600; }
.unit { font-weight: 400; font-size: .85em; margin-left: 6px; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg text.y { text-anchor: end; dominant-baseline: middle; }
svg text.x { text-anchor: middle; }
svg .grid { stroke: var(--rule); }
svg .level { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .cursor { stroke: var(--soft); visibility: hidden; }
svg path { fill: none; stroke-width: 1.3; stroke-linejoin: round; opacity: .75; }
svg path.marked { stroke-width: 1.9; opacity: 1; }
svg path.dashed { stroke-dasharray: 5 3; }
svg path.c0 { stroke: var(--c0); } svg circle.c0 { fill: var(--c0); }
svg path.c1 { stroke: var(--c1); } svg circle.c1 { fill: var(--c1); }
svg path.c2 { stroke: var(--c2); } svg circle.c2 { fill: var(--c2); }
svg path.c3 { stroke: var(--c3); } svg circle.c3 { fill: var(--c3); }
svg path.c4 { stroke: var(--c4); } svg circle.c4 { fill: var(--c4); }
svg path.c5 { stroke: var(--c5); } svg circle.c5 { fill: var(--c5); }
svg path.c6 { stroke: var(--c6); } svg circle.c6 { fill: var(--c6); }
svg path.c7 { stroke: var(--c7); } svg circle.c7 { fill: var(--c7); }
.keys { font-size: .8em; color: var(--soft); line-height: 1.35; }
.keys span { margin-right: 12px; display: inline-block; overflow-wrap: anywhere; }
.keys i {
  display: inline-block; width: 18px; height: 0; margin-right: 5px;
  vertical-align: middle; border-top: 2px solid;
}
.keys i.marked { border-top-width: 4px; }
.keys i.dashed { border-top-style: dashed; }
.tip {
  position: absolute; z-index: 2; pointer-events: none; display: none;
  padding: 5px 8px; border-radius: 6px; font-size: .78rem; line-height: 1.35;
  background: var(--ink); color: var(--paper); max-width: 90%;
  font-variant-numeric: tabular-nums;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td {
  text-align: left; vertical-align: top; padding: 4px 14px 4px 0;
  border-bottom: 1px solid var(--rule);
}
th { font-weight: 600; }
td.number {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
}
th.number { text-align: right; }
td.key { font-family: ui-monospace, monospace; font-size: .92em; white-space: nowrap; }
td.value { overflow-wrap: anywhere; min-width: 9em; }
td.soft { white-space: nowrap; }
details { margin: 10px 0; }
summary { cursor: pointer; }
dl.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0;
}
dl.facts dt { color: var(--soft); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
blockquote {
  margin: 6px 0 14px; padding-left: 12px; border-left: 3px solid var(--rule);
}
blockquote p { white-space: pre-wrap; overflow-wrap: anywhere; }
"""

# Of each curve the nearest step's value, beside the pointer or the finger.
SCRIPT = """
const data = JSON.parse(document.getElementById("values").textContent);
const shown = v => v === null ? "not finite" : String(+v.toPrecision(5));
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = data.charts[svg.dataset.chart], box = data.box;
  const tip = svg.parentNode.querySelector(".tip");
  const cursor = svg.querySelector(".cursor");
  const hide = () => {
    tip.style.display = "none"; cursor.style.visibility = "hidden";
  };
  const show = event => {
    const at = svg.getBoundingClientRect();
    const scale = box.width / at.width, wide = box.width - box.left - box.right;
    const place = ((event.clientX - at.left) * scale - box.left) / wide;
    if (place < -.1 || place > 1.1) return hide();
    const [low, high] = chart.x, wanted = low + place * (high - low);
    const near = chart.series.map(s => s.points.reduce(
      (a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const step = near.reduce(
      (a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a)[0];
    tip.replaceChildren();
    const line = text => tip.appendChild(
      Object.assign(document.createElement("div"), {textContent: text}));
    line("step " + step);
    chart.series.forEach((s, i) => line(s.label + ": " + shown(near[i][1]) +
      (near[i][0] === step ? "" : " (step " + near[i][0] + ")")));
    const x = box.left + (step - low) / (high - low) * wide;
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    tip.style.display = "block";
    const left = x / scale + svg.offsetLeft, room = svg.parentNode.clientWidth;
    tip.style.left = Math.max(4, left > room / 2 ? left - tip.offsetWidth - 12
      : left + 12) + "px";
    tip.style.top = svg.offsetTop + 8 + "px";
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}
"""

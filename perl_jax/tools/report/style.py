"""The report's page template: HTML frame, CSS (light and dark mode, wide and narrow screens) and script."""

from string import Template

SHELL = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>$title · perl_jax report</title>
<link rel="icon" href="data:,">
<style>$style</style>
</head>
<body>
<header><div class="inner">$head</div></header>
<nav><div class="inner">$links</div></nav>
<main class="inner">$body</main>
<footer><div class="inner">$foot</div></footer>
<div id="tip" hidden></div>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root {
  --bg: #fff; --panel: #fff; --wash: #f6f7f9; --ink: #16191d; --soft: #5c6570; --line: #e3e6ea; --rule: #eceef1;
  --axis: #b4bbc3; --accent: #1f5fbf; --mark: #dfe9fa;
  --good: #14713a; --good-bg: #e3f4e8; --bad: #b3261e; --bad-bg: #fce9e7; --busy: #8a5a00; --busy-bg: #fdf1d8;
  --c0: #2166c4; --c1: #d9661f; --c2: #1b8a5a; --c3: #a23bb0;
  --c4: #c23b4a; --c5: #0f8f9c; --c6: #8a6d1c; --c7: #5d6b7a;
}
@media (prefers-color-scheme: dark) { :root {
  --bg: #121417; --panel: #181b1f; --wash: #1c2025; --ink: #e8eaed; --soft: #9aa4af; --line: #2b3037; --rule: #262b31;
  --axis: #57606a; --accent: #7fb0ff; --mark: #243a5c;
  --good: #6fd393; --good-bg: #16331f; --bad: #ff9b91; --bad-bg: #411d1a; --busy: #f2c46d; --busy-bg: #3a2d10;
  --c0: #6aa5ff; --c1: #ff9a56; --c2: #4fc58d; --c3: #d98ae6;
  --c4: #ff7d8b; --c5: #4fcbd8; --c6: #d5b450; --c7: #a4b1bf;
} }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 52px; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
.inner { max-width: 1240px; margin: 0 auto; padding: 0 28px; }
header { background: var(--wash); padding: 40px 0 32px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 44px 0 8px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 26px 0 8px; font-weight: 600; }
.eyebrow { margin: 0 0 8px; color: var(--soft); font-size: 13px; }
.lead { max-width: 78ch; margin: 0 0 6px; font-size: 17px; }
.soft, .note, footer { color: var(--soft); }
.none { color: var(--soft); opacity: .7; }
.note { margin: 4px 0 12px; font-size: 13.5px; max-width: 100ch; }
.warn { color: var(--busy); background: var(--busy-bg); padding: 8px 12px; border-radius: 6px; font-size: 14px; }
.warn { max-width: 100ch; }
nav { position: sticky; top: 0; z-index: 2; background: var(--bg); border-bottom: 1px solid var(--line); }
nav .inner { display: flex; gap: 24px; overflow-x: auto; scrollbar-width: none; }
nav a { color: var(--soft); text-decoration: none; padding: 11px 0; font-size: 14px; white-space: nowrap; }
nav a:hover { color: var(--accent); }
footer { margin-top: 56px; padding: 20px 0 40px; border-top: 1px solid var(--line); font-size: 13px; }
footer p { max-width: 100ch; margin: 0 0 8px; }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin-top: 26px; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile h3 { margin: 0; font-size: 13.5px; color: var(--soft); }
.tile .value { margin: 2px 0 0; font-size: 30px; line-height: 1.25; font-weight: 600; letter-spacing: -.02em; }
.tile .value small { font-size: 16px; font-weight: 400; color: var(--soft); }
.tile .what { font-size: 13px; color: var(--soft); }
.tile .more { margin: 8px 0 0; font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 14px; }
.tile .more small, .from { font-weight: 400; }
.from { color: var(--soft); }
.tile .value .from { font-size: 22px; }
.tile b { color: var(--ink); font-weight: 600; }

table, .value, .tick, .judged, .more, #tip { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th { font-weight: 500; color: var(--soft); font-size: 13px; text-align: left; white-space: nowrap; }
th, td { padding: 8px 22px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.runs { width: 100%; }
.runs td { white-space: nowrap; }
.runs.plain td { white-space: normal; overflow-wrap: anywhere; }
.runs:not(.plain) :is(td, th):nth-child(n+3) { text-align: right; }
.runs :is(td, th):last-child { padding-right: 4px; }
.final { font-weight: 600; }
.under { display: block; color: var(--soft); font-size: 12px; }
.config { margin-bottom: 16px; }
.config td:first-child { min-width: 180px; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { background: var(--wash); padding: 14px 16px; border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { margin: 8px 0 16px; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
.dot { background: currentColor; }
.chip { display: inline-block; padding: 1px 8px; border-radius: 99px; font-size: 12.5px; }
.chip { background: var(--wash); color: var(--soft); }
.chip.better { background: var(--good-bg); color: var(--good); }
.chip.worse { background: var(--bad-bg); color: var(--bad); }
.chip.busy { background: var(--busy-bg); color: var(--busy); }
.chips { white-space: nowrap; }

.legend { list-style: none; margin: 0 0 12px; padding: 0; font-size: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; align-items: baseline; }
.legend .soft { font-size: 13px; }
.key { width: 26px; height: 10px; margin-right: 8px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 22px 26px; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 14px; margin-bottom: 4px; }
figcaption .soft { font-size: 13px; margin-left: 4px; }
figure .note { font-size: 13px; margin: 2px 0 0; }
.plot { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.tick { fill: var(--soft); font-size: 11px; }
.rule { stroke: var(--rule); fill: none; }
.axis { stroke: var(--axis); fill: none; }
.smooth, .eval, .path, .raw { fill: none; stroke: currentColor; stroke-linejoin: round; stroke-linecap: round; }
.smooth, .path { stroke-width: 1.8; }
.plot polyline { vector-effect: non-scaling-stroke; }
.eval { stroke-width: 1.2; }
.raw { stroke-width: 1; opacity: .3; }
.many .raw { opacity: .13; }
.dots { fill: currentColor; opacity: .28; }
.mark { fill: currentColor; stroke: var(--bg); stroke-width: 1.2; }
.dashed { stroke-dasharray: 5 4; stroke-linecap: butt; }
.cursor { stroke: var(--axis); stroke-dasharray: 2 2; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
#tip {
  position: fixed; z-index: 3; pointer-events: none; padding: 6px 10px; font-size: 12.5px; white-space: nowrap;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 4px 14px rgb(0 0 0 / .12);
}
#tip[hidden] { display: none; }

summary { cursor: pointer; padding: 8px 0; font-weight: 500; }
summary .soft { font-weight: 400; }
.fold { border-top: 1px solid var(--line); }
.row { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 22px; padding: 12px 0; }
.row { border-top: 1px solid var(--line); font-size: 14px; }
.two .row { grid-template-columns: 1fr 1fr; }
.row > div { min-width: 0; }
.row.head { color: var(--soft); font-size: 13px; padding: 6px 0; border: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15em; overflow-y: auto; }
.reference { margin: 6px 0 0; color: var(--soft); font-size: 13px; }
.reference span { font-weight: 600; }
.judged { margin: 6px 0 0; font-size: 13px; color: var(--soft); }
.judged { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; }
.judged b { color: var(--ink); font-weight: 600; }
.right { color: var(--good); }
.wrong { color: var(--bad); }
del, ins { text-decoration: none; border-radius: 3px; padding: 0 1px; background: var(--mark); }

@media (max-width: 720px) {
  .inner { padding: 0 16px; }
  header { padding: 26px 0 22px; }
  h1 { font-size: 26px; }
  .lead { font-size: 16px; }
  .wide .tick { font-size: 15px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .tile .value { font-size: 24px; }
  .runs thead { display: none; }
  .runs tr { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 18px; padding: 12px 0; }
  .runs tr { border-bottom: 1px solid var(--line); }
  .runs td, .runs:not(.plain) td:nth-child(n+3) { padding: 0; border: 0; text-align: left; white-space: normal; }
  .runs td:first-child { grid-column: 1 / -1; font-weight: 600; }
  .runs td:not(:first-child)::before { content: attr(data-head); display: block; font-size: 12px; color: var(--soft); }
  .runs.plain tr { grid-template-columns: 1fr; }
  .row, .two .row { grid-template-columns: 1fr; gap: 10px; }
  .row.head { display: none; }
  .sft::before { content: "SFT answer"; }
  .policy::before { content: "Policy answer"; }
  .two .policy::before { content: "Answer"; }
  .sft::before, .policy::before { display: block; font-size: 12px; color: var(--soft); }
}
@media print { nav, #tip { display: none; } header { background: none; } .text { max-height: none; } }
"""

# A plot carries its scales in data attributes, so the script reads the values back from the lines as they are drawn.
SCRIPT = r"""
const tip = document.getElementById('tip');
const round = v => (Math.abs(v) >= 1000 ? Math.round(v).toLocaleString('en') : String(Number(v.toPrecision(3))));
const show = (v, share) => (share ? (100 * v).toFixed(1) + '%' : round(v)).replace('-', '\u2212');
const line = (color, text) => {
  const row = document.createElement('div'), dot = document.createElement('span');
  dot.className = 'dot ' + color;
  row.append(...(color ? [dot, text] : [text]));
  return row;
};
for (const svg of document.querySelectorAll('.plot')) {
  const points = e => e.getAttribute('points').split(' ').map(p => p.split(',').map(Number));
  const lines = [...svg.querySelectorAll('.smooth, .eval')].map(e => ({e, at: points(e)}));
  if (!lines.length) continue;
  const numbers = name => svg.dataset[name].split(',').map(Number);
  const [x0, x1] = numbers('x'), [y0, y1] = numbers('y'), [left, top, width, height] = numbers('box');
  const cursor = document.createElementNS(svg.namespaceURI, 'path');
  cursor.setAttribute('class', 'cursor');
  svg.append(cursor);
  const leave = () => { tip.hidden = true; cursor.removeAttribute('d'); };
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width - left;
    const nearest = at => at.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    const found = lines.map(({e, at}) => ({e, p: nearest(at)})).filter(({p}) => Math.abs(p[0] - x) < 0.08 * width);
    if (!found.length || x < -6 || x > width + 6) return leave();
    const place = nearest(found.map(({p}) => p))[0], step = x0 + place / width * (x1 - x0);
    cursor.setAttribute('d', `M${left + place} ${top}v${height}`);
    tip.replaceChildren(line('', svg.dataset.axis + ' ' + round(step)), ...found.map(({e, p}) => {
      const value = show(y1 - p[1] / height * (y1 - y0), svg.dataset.share == '1');
      return line(e.getAttribute('class').match(/c\d/)[0], `${e.dataset.label}  ${value}`);
    }));
    tip.hidden = false;
    const below = event.clientY + 16, fits = below + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(6, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6)) + 'px';
    tip.style.top = (fits ? below : event.clientY - tip.offsetHeight - 10) + 'px';
  });
}
"""


def shell(title: str, head: str, links: str, body: str, foot: str) -> str:
    """Return the page around these pieces of HTML, which must be escaped already."""
    return SHELL.substitute(title=title, head=head, links=links, body=body, foot=foot, style=STYLE, script=SCRIPT)

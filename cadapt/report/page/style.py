"""How pages look: two palettes, one for each preference of the reader, and one sheet that knows them by name.

Colour says only what words or shapes say as well. Blue and orange stay apart for every kind of colour vision.
"""

from __future__ import annotations

from collections.abc import Mapping

# each colour of text reaches 4.5 to 1 on "paper" and on "panel", see tests/report/test_page_style.py
LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1a2027",
    "muted": "#56606b",
    "rule": "#d9dee4",
    "gone": "#0b5fa5",
    "soft": "#4a90cc",
    "stays": "#a34b00",
    "light": "#c9803a",
    "refused": "#a5123f",
    "good": "#0b5fa5",
    "bad": "#a5123f",
    "allowed": "#e8f1f9",
    "marked": "#eaf2fa",
}
DARK: Mapping[str, str] = {
    "paper": "#12161b",
    "panel": "#1b2128",
    "ink": "#e7eaee",
    "muted": "#a3adb8",
    "rule": "#343c46",
    "gone": "#74b9f2",
    "soft": "#3f82bd",
    "stays": "#f2a65a",
    "light": "#b5712c",
    "refused": "#ff8a9c",
    "good": "#74b9f2",
    "bad": "#ff8a9c",
    "allowed": "#16283a",
    "marked": "#1a2c3e",
}


def _variables(palette: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


_SHEET = """
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 80rem; padding: 3rem 2rem 2rem;
  font: 400 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
}
h1, h2, p, ul, dl, dd, figure { margin: 0; padding: 0; }
h1 { font-size: 2rem; line-height: 1.15; font-weight: 650; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; font-weight: 650; letter-spacing: -.005em; }
section { margin-top: 3.25rem; }
.eyebrow { color: var(--muted); font-size: .8125rem; font-weight: 600; letter-spacing: .06em;
  text-transform: uppercase; margin-bottom: .5rem; }
.verdict { font-size: 1.1875rem; line-height: 1.45; margin: .75rem 0 1rem; max-width: 46em; }
.verdict, .lead { overflow-wrap: anywhere; text-wrap: pretty; }
.lead { color: var(--muted); max-width: 60em; margin: .25rem 0 0; font-size: .9375rem; }
.badges { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; }
.badges li { border: 1px solid currentColor; border-radius: 1rem; padding: .125rem .75rem; font-size: .8125rem;
  font-weight: 600; overflow-wrap: anywhere; }
.badges .good { color: var(--good); } .badges .bad { color: var(--bad); } .badges .plain { color: var(--muted); }
footer { color: var(--muted); font-size: .8125rem; border-top: 1px solid var(--rule); margin-top: 3.5rem;
  padding-top: 1rem; }
code, .code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: .92em;
  font-variant-ligatures: none; }

.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); list-style: none;
  margin-top: 2rem; border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; }
.tiles li { background: var(--paper); padding: .875rem 1rem 1rem; display: flex; flex-direction: column;
  box-shadow: 0 0 0 1px var(--rule); }
.tiles .label { color: var(--muted); font-size: .8125rem; }
.tiles .value { font-size: 1.625rem; line-height: 1.3; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tiles .detail { color: var(--muted); font-size: .8125rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.tiles .good .value { color: var(--good); } .tiles .bad .value { color: var(--bad); }

section > .frame, section > dl { margin-top: 1.25rem; }
.frame { overflow-x: auto; border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
.frame:focus-visible { outline: 2px solid var(--gone); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; line-height: 1.4; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { padding: .375rem .5rem; text-align: left; vertical-align: baseline; font-weight: 400; }
th:first-child, td:first-child { padding-left: .25rem; }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
thead th.group { text-align: center; border-bottom: 0; padding-bottom: 0; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
tbody tr.marked { background: var(--marked); }
.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { min-width: 13rem; display: block; overflow-wrap: anywhere; }
.frame .code { max-width: 22rem; min-width: 9rem; overflow-wrap: anywhere; }
.status { white-space: nowrap; }

svg { display: block; overflow: visible; }
svg text { font-size: 12px; fill: var(--muted); font-variant-numeric: tabular-nums; }
svg text.strong { fill: var(--ink); font-weight: 600; }
svg.mark { display: inline-block; vertical-align: -1px; margin-right: .4em; }
.s-exact, .s-dropped { --c: var(--gone); } .s-fitted { --c: var(--soft); } .s-simplified { --c: var(--light); }
.s-kept { --c: var(--stays); } .s-refined { --c: var(--ink); } .s-refused { --c: var(--refused); }
.solid { fill: var(--c); }
.line { fill: var(--paper); stroke: var(--c); stroke-width: 1.75; }
.cell { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
.cell.s-dropped { fill: var(--allowed); stroke: var(--c); }
.fill { fill: var(--c); }
.s-dropped .fill { fill: var(--allowed); stroke: var(--c); }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--muted); stroke-width: 1; }
.path { stroke: var(--gone); stroke-width: 1.75; stroke-linecap: round; }
.faint { stroke: var(--gone); stroke-width: 1.25; stroke-dasharray: 3 3; }
.bound { stroke: var(--stays); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg text.bound-name { fill: var(--stays); paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.allowed { fill: var(--allowed); }
.guide { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 1 3; }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.75; }
.outline { fill: none; stroke: var(--muted); stroke-width: 1; }
.track { fill: var(--panel); }

.plot { padding: 0 1.25rem 0 4rem; margin-top: 1.5rem; }
.plot + .plot { margin-top: 1.25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; margin: .75rem 0 0;
  font-size: .8125rem; color: var(--muted); }
.legend + .frame, .plot + .legend + details { margin-top: 1.25rem; }
.strip { margin: 1.25rem 0 1rem; }
.layers { margin-top: 1.25rem; }
.whisker { min-width: 9rem; }
.s-base { --c: var(--muted); }
.heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
details { margin-top: 1.25rem; font-size: .875rem; }
summary { cursor: pointer; color: var(--gone); margin-bottom: .5rem; }
details .frame { margin-top: .5rem; }

.layers th[scope=row] { white-space: nowrap; width: 1%; padding-right: 1.25rem; }
.layers thead th { white-space: normal; }
.layers td { min-width: 7.5rem; padding-top: .25rem; padding-bottom: .25rem; }
.layers tbody tr + tr > * { border-top-color: var(--panel); }
.layers .bar { display: flex; align-items: center; gap: .5rem; }
.layers .bar svg { flex: 1 1 auto; min-width: 0; }
.layers thead span { display: block; font-weight: 400; }
.layers .bar span { flex: 0 0 4.25em; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }

dl { display: grid; gap: .625rem; font-size: .875rem; max-width: 60rem; }
dl div { display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; }
dt { font-weight: 600; } dd { color: var(--muted); overflow-wrap: anywhere; }

@media (max-width: 45rem) {
  body { padding: 1.5rem 1rem; font-size: 15px; }
  h1 { font-size: 1.5rem; }
  .verdict { font-size: 1.0625rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .tiles .value { font-size: 1.25rem; }
  .plot { padding: 0 .75rem 0 3.25rem; }
  dl div { grid-template-columns: 1fr; gap: 0; }
  .layers tr { display: flex; flex-wrap: wrap; }
  .layers th[scope=row] { flex: 1 0 100%; width: auto; white-space: normal; overflow-wrap: anywhere;
    padding: .5rem 0 0; }
  .layers td { flex: 1 1 0; min-width: 0; border-top: 0 !important; padding: 0 .5rem .375rem 0; }
  .layers thead th { flex: 1 1 0; padding-left: 0; }
  .layers thead th:first-child, .layers thead span { display: none; }
  .layers .bar { flex-direction: column-reverse; align-items: stretch; gap: 0; }
  .layers .bar svg, .layers .bar span { flex: 0 0 auto; text-align: left; }
}
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  section { margin-top: 1.75rem; }
  .plot, .tiles, tr { break-inside: avoid; }
  h2, .lead { break-after: avoid; }
  .frame { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .2rem .3rem; } .wide { min-width: 9rem; }
  .frame .code { min-width: 5.5rem; }
  svg, .tiles, tr.marked { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

STYLE = (
    f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}{_SHEET}"
)

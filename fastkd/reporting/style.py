"""The one style sheet of all pages: light and dark, narrow and wide, on a screen and on paper.

Colours are named for what they are on: a picture says `var(--ink)` or has a class, and follows the
mode of whoever reads it. Paper is always light.
"""

from __future__ import annotations

LINES = 5
"""Colours of lines; they stay apart also for eyes that lack red or green."""
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2024",
    "soft": "#525c66",
    "rule": "#d8dde3",
    "panel": "#f6f7f9",
    "hover": "#dfe7f1",
    "line-0": "#1e49b7",
    "line-1": "#c8500a",
    "line-2": "#2f8baf",
    "line-3": "#4a0a2f",
    "line-4": "#5d5442",
}
DARK = {
    "paper": "#14171a",
    "ink": "#e6e8ea",
    "soft": "#aab4be",
    "rule": "#3a424b",
    "panel": "#1c2126",
    "hover": "#2f3842",
    "line-0": "#4ab8fd",
    "line-1": "#f08a4b",
    "line-2": "#2f78d0",
    "line-3": "#fbf74f",
    "line-4": "#dbf3ff",
}
_RULES = """
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 75rem; margin: 0 auto; padding: 1rem 1rem 3rem; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--rule) }
p { max-width: 46rem; margin: .5rem 0 }
.lead { color: var(--soft) }
.scroll { overflow-x: auto; margin: .8rem 0; max-width: 100% }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--soft); padding: .2rem 0; white-space: nowrap }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom }
tbody th { font-weight: 400; min-width: 8.5rem }
td { white-space: nowrap }
pre { background: var(--panel); padding: 1rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.45 }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr));
  gap: 1rem; align-items: start }
figure { margin: .5rem 0; padding: .7rem; background: var(--panel); border-radius: .4rem;
  break-inside: avoid; min-width: 0 }
.panels figure { margin: 0 }
figcaption { font-weight: 600; font-size: .95rem; line-height: 1.35; margin-bottom: .3rem }
figure > svg { display: block; width: 100%; max-width: 34rem; height: auto }
figure > .scroll > svg { display: block; max-width: none; margin: 0 }
.legend { list-style: none; margin: .3rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
  gap: .1rem 1rem; font-size: .82rem; color: var(--soft) }
.legend li { overflow-wrap: anywhere }
.legend svg { width: 22px; height: 10px; margin-right: .35rem; vertical-align: middle }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft) }
svg .strong { fill: var(--ink) }
svg .inside { fill: var(--paper) }
.grid { stroke: var(--rule) }
.axis { stroke: var(--soft) }
.band { fill: transparent }
.band:hover { fill: var(--hover) }
.bar { fill: var(--line-0) }
.node { fill: var(--line-0) }
.unused { fill: var(--panel); stroke: var(--soft) }
.link { stroke: var(--line-1); fill: none }
.link:hover { stroke: var(--ink) }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round;
  pointer-events: none }
.dot { stroke-width: 5 }
.reference { stroke: var(--ink); stroke-dasharray: 1 5 }
.dash-1 { stroke-dasharray: 7 5 }
.dash-2 { stroke-dasharray: 2 5 }
@media print { body { font-size: 12px; max-width: none; padding: 0 } pre { white-space: pre-wrap }
  .scroll { overflow: visible } h2 { break-after: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""


def _variables(colours: dict[str, str]) -> str:
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


STYLE = (
    f":root {{ color-scheme: light; {_variables(LIGHT)} }}\n"
    "@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; "
    f"{_variables(DARK)} }} }}"
    + _RULES
    + "".join(f".line-{n} {{ stroke: var(--line-{n}) }}\n" for n in range(LINES))
)

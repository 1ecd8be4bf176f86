"""The page that reports are written on: one HTML file that asks nothing of anybody, and the door for text.

Everything that comes from a run is hostile until it is escaped: a model may write any text.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

# What a browser would hide, or obey by turning the text around it, is shown by its number.
HIDDEN = [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]
PICTURES = {code: f"[U+{code:04X}]" for code in [*HIDDEN, *range(0x2066, 0x206A)]}


def safe(value: Any) -> str:
    """Anything as text for the page: the one door from a run's content to HTML."""
    return escape(str(value).translate(PICTURES))


def write_page(path: Path, page: str) -> None:
    """Write a page; a lone surrogate, which JSON can carry, has no UTF-8."""
    path.write_bytes(page.encode("utf-8", "replace"))


def wide_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a head; the first column names its rows."""
    over = "".join(f"<th>{safe(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr><th>{safe(first)}</th>{''.join(f'<td>{safe(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in rows
    )
    return f'<div class="scroll"><table class="wide"><tr>{over}</tr>{lines}</table></div>'


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --text: #24272c; --soft: #6a7079;
  --rule: #e6e5e0; --c0: #2f6cb3; --c1: #c06a2c; --c2: #3f8660; --c3: #8058a6; --c4: #b3475d; --c5: #587786; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1c1f23; --text: #e3e4e2;
  --soft: #979da6; --rule: #2d3136; --c0: #77aef0; --c1: #e3a063; --c2: #78c096; --c3: #b998de;
  --c4: #ea8599; --c5: #98b6c4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 3rem 1.5rem 4rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.9rem; font-weight: 650; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; font-weight: 620; margin: 2.6rem 0 .6rem; }
h3 { font-size: .95rem; font-weight: 620; margin: 0; overflow-wrap: anywhere; }
p { margin: 0; overflow-wrap: anywhere; }
header p, h2 + p, .tile p, figcaption { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem;
  margin: 1.8rem 0 1rem; }
.tile, figure, article { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: .9rem 1.1rem; font-size: .85rem; }
.tile strong { display: block; font-size: 1.75rem; font-weight: 620; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.large, .small { display: grid; gap: 1rem; margin-top: 1rem; }
.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
figure { display: flex; flex-direction: column; min-width: 0; margin: 0; padding: 1rem 1.1rem .7rem; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .1rem 1rem;
  margin-bottom: .5rem; font-size: .82rem; overflow-wrap: anywhere; }
figcaption h3 { color: var(--text); }
figcaption div { display: flex; flex-wrap: wrap; gap: 0 .9rem; }
figcaption i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em;
  background: var(--c); }
figcaption b { margin-left: .45em; color: var(--text); font-weight: 550; }
svg { display: block; width: 100%; height: auto; margin-top: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
.grid { stroke: var(--rule); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.line, .raw, .whisker { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.raw { stroke-width: 1; opacity: .3; } .band { fill: var(--c); opacity: .16; } .whisker { opacity: .5; }
circle { fill: var(--c); }
.note { color: var(--soft); font-size: .85rem; margin-top: .8rem; }
.warning { color: var(--c4); font-size: .82rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem;
  align-items: start; }
.pair > * { min-width: 0; }
h2 + p + .pair { margin-top: .8rem; }
article { margin-top: .7rem; padding: .8rem 1rem; font-size: .85rem; }
article > p:last-child { color: var(--soft); }
.question { font-weight: 550; white-space: pre-wrap; max-height: 8rem; overflow: auto; }
h2 + .question { color: inherit; }
h2 + p + .question { margin-top: .8rem; }
.beside + .question { margin-top: 1.4rem; }
.beside { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(min(100%, 300px), 1fr); gap: 1rem;
  overflow-x: auto; }
.beside > * { min-width: 0; }
pre { margin: .5rem 0; padding: .6rem .75rem; max-height: 15rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--page); border-radius: 7px;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.command { border: 1px solid var(--rule); background: var(--card); }
.correct { color: var(--c2); } .wrong { color: var(--c4); } .undecided { color: var(--c1); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; table-layout: fixed; }
.pair h2 { margin-top: 1.6rem; }
th, td { padding: .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
th { width: 42%; padding-right: 1rem; color: var(--soft); font-weight: 450; }
.scroll { overflow-x: auto; }
.wide { table-layout: auto; margin-top: .6rem; }
.wide th, .wide td { width: auto; padding-right: 1.2rem; font-variant-numeric: tabular-nums; }
</style>
</head>
<body>
<header><h1>$title</h1><p>$facts</p></header>
$body
</body>
</html>
""")

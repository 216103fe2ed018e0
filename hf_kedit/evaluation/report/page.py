"""The frame of an HTML report: style, script, and tables that scroll where a screen is narrow. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ...storage.display import printable

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #566170; --line: #d9dee6; --paper: #ffffff;
  --panel: #f4f6f9; --track: #e1e6ed; --good: #0b7a4b; --bad: #b3261e; --mark: #fff0b3; --lost: #fbdad7;
  --shade: #00000038; --surface: var(--paper) }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf0; --soft: #a3adba; --line: #37404d; --paper: #14181f;
  --panel: #1d232c; --track: #343d49; --good: #5fd39c; --bad: #ff8a80; --mark: #5a4a10; --lost: #5c2723;
  --shade: #000000b0 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1180px; padding: 32px 24px 64px }
h1 { font-size: 1.75rem; line-height: 1.25; letter-spacing: -.01em; margin: .1rem 0 .6rem; max-width: 32em;
  overflow-wrap: anywhere }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.8rem 0 .3rem } h2 .soft { font-weight: 400; font-size: 1rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } .soft, p.note { color: var(--soft) }
p.note { max-width: 75ch; margin: .3rem 0 1rem; font-size: .9rem }
.above { color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; margin: 0 }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 16px;
  margin: 1rem 0 }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)) }
.panel { background: var(--panel); border-radius: 10px; padding: 14px 16px 16px }
.panels.lead { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); align-items: start }
.lead p { margin: .35rem 0; font-size: .92rem; overflow-wrap: anywhere }
.panel > strong { display: block; margin-bottom: .5rem } .panel svg { width: 100%; height: auto }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .grid { stroke: var(--line); stroke-width: 1 }
.bar { margin: 0 0 .55rem; font-size: .84rem; line-height: 1.35 } .bar:last-child { margin: 0 }
.bar .words { display: flex; gap: .6rem; align-items: baseline } .bar .name { flex: 1; overflow-wrap: anywhere }
.bar .range { color: var(--soft); font-size: .76rem; white-space: nowrap }
.bar .range, .bar .value, td.n, th.n { font-variant-numeric: tabular-nums }
.bar .value { font-weight: 600; min-width: 3.6em; text-align: right; white-space: nowrap }
.track { display: block; position: relative; height: 12px; background: var(--track); border-radius: 3px;
  margin-top: 2px } .track span { position: absolute; top: 0; bottom: 0 } .fill { left: 0; border-radius: 3px }
.track .sure { top: 5px; bottom: 5px; background: var(--ink); outline: 1px solid var(--panel) }
.track .before { width: 2px; top: -3px; bottom: -3px; margin-left: -1px; background: var(--ink) }
.key { white-space: nowrap; margin-right: .8em }
.of { display: flex; gap: .8em; justify-content: space-between; font-variant-numeric: tabular-nums }
.of .key { margin: 0 }
.best, .worst { font-weight: 600 } .best::before { content: "▲ "; font-size: .75em; vertical-align: .1em }
.worst::before { content: "▼ "; font-size: .75em; vertical-align: .1em } .up { color: var(--good) }
.down, .warning { color: var(--bad) } .warning { font-weight: 600 }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; scrollbar-width: thin; scrollbar-color: var(--soft) var(--track);
  background: linear-gradient(to left, var(--surface) 40%, transparent) right / 48px 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat scroll }
.scroll:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px }
.scroll.wide::before { content: "more columns: scroll →"; position: sticky; left: 0; display: block;
  width: max-content; color: var(--soft); font-size: .76rem; padding-bottom: .2rem }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem }
th { font-weight: 600; vertical-align: bottom }
th, td { text-align: left; padding: .4rem .75rem; border-bottom: 1px solid var(--line) } td { vertical-align: top }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--surface); padding-left: 0;
  min-width: 7em; max-width: 15em; overflow-wrap: break-word }
td.n, th.n { text-align: right } td.n { white-space: nowrap } th.n { max-width: 9em }
td.down:not(.n) { min-width: 14em }
details.more, details.behind { margin: .6rem 0 } summary { cursor: pointer; padding: .4rem 0 }
details.behind { border: 1px solid var(--line); border-radius: 10px; padding: .4rem 16px; margin-top: 2.8rem }
details.behind h2 { margin-top: 1.2rem } details.run { border-bottom: 1px solid var(--line) }
details.run[open] { padding-bottom: 1rem } details.run > summary, details.behind > summary { font-weight: 600 }
details.case { border-bottom: 1px solid var(--line) }
details.case[open] { background: var(--panel); padding: 0 1rem .8rem; border-radius: 10px; --surface: var(--panel) }
.target, mark { background: var(--mark); color: inherit; padding: 0 .2em; border-radius: 3px }
mark.lost { background: var(--lost) } tr.lost td { color: var(--bad) } tr.lost td.text { color: inherit }
tr.lost td:first-child { box-shadow: inset 3px 0 var(--bad); padding-left: .6rem }
.thumb { height: 44px; border-radius: 4px; vertical-align: middle; margin: 2px 4px 2px 0; background: var(--track) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 16em; max-width: 46ch }
input[type=search] { font: inherit; padding: .4rem .7rem; width: min(26rem, 100%); border: 1px solid var(--soft);
  border-radius: 6px; background: var(--paper); color: inherit; margin: .5rem 0 .8rem }
@media (max-width: 600px) { body { padding: 20px 16px 48px } h1 { font-size: 1.4rem } details.behind { padding: .4rem
  12px } th:first-child, td:first-child { max-width: 9em } }
"""
_SCRIPT = """
document.querySelectorAll('input[type=search]').forEach(function (field) {
  field.addEventListener('input', function () {
    var typed = field.value.toLowerCase();
    document.getElementById(field.dataset.list).querySelectorAll('details.case').forEach(function (entry) {
      entry.hidden = entry.textContent.toLowerCase().indexOf(typed) < 0;
    });
  });
});
function widths() {
  document.querySelectorAll('.scroll').forEach(function (box) {
    box.classList.toggle('wide', box.scrollWidth > box.clientWidth + 1);
  });
}
widths();
addEventListener('resize', widths);
document.addEventListener('toggle', widths, true);
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document.

    Args:
        title: as plain text.
        body: its parts as HTML; empty ones are left out.
    """
    # What texts of others hold beside letters: in HTML an override of the direction still turns what stands behind it.
    inside, title = printable("\n".join(part for part in body if part)), printable(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{inside}\n"
        f"<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def scrolling(table: str) -> str:
    """The inside of a table, in a box that can be scrolled with fingers, a mouse and the keyboard."""
    return f'<div class="scroll" role="region" aria-label="table" tabindex="0"><table>{table}</table></div>'


def number_table(head: Sequence[str], rows: Iterable[tuple[str, str]], last: str = "") -> str:
    """A table of numbers with a name in front of each row.

    Args:
        head: names of the columns.
        rows: name and cells, these as HTML.
        last: name of a last column that holds words, if there is one.
    """
    names = "".join(f'<th class="n">{escape(name)}</th>' for name in head)
    names += f"<th>{escape(last)}</th>" if last else ""
    body = "".join(f"<tr><td>{escape(label)}</td>{cells}</tr>" for label, cells in rows)
    return scrolling(f"<tr><th></th>{names}</tr>{body}")

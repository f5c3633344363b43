"""One HTML page that needs nothing but itself: pictures inside, no scripts, no fonts from elsewhere."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sdpipe.report.html_tables import degradation_html, runs_table, table1_html, table2_html
from sdpipe.report.plan import Drawing, NotDrawn
from sdpipe.report.runs import Run, repetitions
from sdpipe.version import __version__

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2024; background: #fff; margin: 0 auto;
  max-width: 76rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid #1f5fa8; padding-bottom: .2rem; }
p { max-width: 46rem; margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #dde1e6; }
th { background: #f1f4f7; font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.wide { min-width: 9rem; }
.mark { color: #a3231f; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; height: auto; border: 1px solid #dde1e6; }
figcaption { font-size: .86rem; }
code { background: #f1f4f7; padding: .05rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
li { margin: .4rem 0; }
@media print { body { max-width: none; font-size: 10pt; padding: 0; } .scroll { overflow: visible; }
  table { font-size: 6.5pt; } th, td { padding: .1rem .25rem; } td.wide { min-width: 0; }
  tr { break-inside: avoid; } .figures { grid-template-columns: 1fr 1fr; gap: 1rem; } }
"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page shows. figures: each with its PNG."""

    runs: Sequence[Run]
    table1: Sequence[Mapping[str, Any]]
    table2: Sequence[Mapping[str, Any]]
    degradation: Sequence[Mapping[str, Any]]
    figures: Sequence[tuple[Drawing, bytes]]
    not_drawn: Sequence[NotDrawn]
    problems: Sequence[str]  # of runs that were left out


def page_html(page: Page) -> str:
    """The page as text."""
    title = "Deep Networks with Stochastic Depth: what was run"
    sections = [
        f"<h1>{title}</h1>",
        _introduction(page),
        _section("Runs", runs_table(page.runs), _list(repetitions(page.runs)), _left_out(page.problems)),
        _section("Table 1: test error", _TABLE1_NOTE, table1_html(page.table1)),
        _section("Table 2: training time", _TABLE2_NOTE, table2_html(page.table2)),
    ]
    if page.degradation:
        sections.append(_section("Plain nets and skips, constant depth", degradation_html(page.degradation)))
    figures = "".join(_figure(drawing, png) for drawing, png in page.figures)
    sections.append(_section("Figures", f'<div class="figures">{figures}</div>'))
    if page.not_drawn:
        sections.append(_section("Not drawn", _not_drawn(page.not_drawn)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


_TABLE1_NOTE = (
    "<p>Percent, mean ± sample standard deviation over n seeds, at the epoch of lowest validation error. "
    "Difference: this training minus constant depth, in points. The paper's numbers (p_L 0.5, linear decay) "
    "are for context only where they are not of this very training: then it is said of what they are.</p>"
)
_TABLE2_NOTE = (
    "<p>Whole trainings with their validations, mean ± sample standard deviation. Saving: 1 - this training "
    "/ constant depth, of the means. The paper's times are of its own machine.</p>"
)


def _introduction(page: Page) -> str:
    num_full = sum(run.recipe is not None for run in page.runs)
    num = len(page.runs)
    if num_full == num:
        size = "All have the size of the paper's recipes."
    elif num_full:
        size = f"{num_full} of them have the size of the paper's recipes; what stems from others is marked."
    else:
        size = "None has size and settings of a recipe of the paper: nothing here repeats a result of it."
    runs = f"{num} finished run{'s' if num > 1 else ''}"
    mark = "" if num_full == num else ' class="mark"'
    return (
        "<p>The figures and tables of Huang, Sun, Liu, Sedra and Weinberger (ECCV 2016, arXiv 1603.09382), "
        f"drawn again by <code>sdpipe report</code> {escape(__version__)} from {runs}. "
        f"<strong{mark}>{size}</strong></p>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def _list(lines: Iterable[str], mark: str = "") -> str:
    items = "".join(f"<li{mark}>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _left_out(problems: Iterable[str]) -> str:
    return _list((f"Left out: {problem}" for problem in problems), ' class="mark"')


def _figure(drawing: Drawing, png: bytes) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    mark = f' <span class="mark">{escape(_capital(drawing.mark))}.</span>' if drawing.mark else ""
    return (
        f'<figure><img src="{source}" alt="{escape(drawing.title)}">'
        f"<figcaption><strong>{escape(drawing.number)}: {escape(drawing.title)}.</strong> "
        f"{escape(drawing.caption)}{mark} <code>{escape(drawing.name)}.png</code></figcaption></figure>\n"
    )


def _not_drawn(figures: Iterable[NotDrawn]) -> str:
    items = []
    for figure in figures:
        commands = " or ".join(f"<code>{escape(command)}</code>" for command in figure.commands)
        how = f"; {commands} makes such runs" if commands else ""
        items.append(
            f"<li><strong>{escape(figure.number)}</strong>, {escape(figure.title)}: needs "
            f"{_with_code(figure.missing)}{how}.</li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def _with_code(text: str) -> str:
    """What stands between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""The tables of the page: every cell escaped, in a box that scrolls where the screen is narrow."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sdpipe.report.labels import data_name
from sdpipe.report.runs import Run
from sdpipe.report.settings import departure, kind_of


@dataclass(frozen=True)
class Markup:
    """HTML that is escaped already; every other value of a cell is not."""

    html: str


Cell = str | int | float | Markup
_TEXT, _WIDE, _NUMBER = "", "wide", "number"


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]]) -> str:
    """columns: (title, kind of cell)."""
    head = "".join(f"<th{_class(kind)}>{escape(title)}</th>" for title, kind in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{_class(kind)}>{cell.html if isinstance(cell, Markup) else escape(str(cell))}</td>"
            for (_, kind), cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def runs_table(runs: Iterable[Run]) -> str:
    """A row for each run."""
    numbers = ("layers", "seed", "epochs", "images", "test error, %", "time")
    return _table(
        [("run", _WIDE), ("data", _TEXT), ("training", _TEXT)]
        + [(title, _NUMBER) for title in numbers]
        + [("hardware", _TEXT), ("commit", _TEXT), ("size", _TEXT)],
        [
            (
                run.run,
                data_name(run),
                ("plain net, " if run.params["skip"] == "plain" else "") + kind_of(run.params).name,
                run.params["depth"],
                run.params["seed"],
                run.params["epochs"],
                f"{run.num_train:,}",
                f"{100 * run.test_error:.2f}",
                duration(run.train_s),
                run.hardware,
                (run.git_commit or "unknown")[:8] + (" + changes" if run.git_dirty else ""),
                _size(run.recipe or "", departure(run)),
            )
            for run in runs
        ],
    )


def table1_html(rows: Iterable[Mapping[str, Any]]) -> str:
    """Measured test errors beside the paper's."""
    numbers = ("n", "constant depth, %", "this training, %", "difference")
    return _table(
        [("setting", _WIDE), ("training", _WIDE)]
        + [(title, _NUMBER) for title in numbers]
        + [("", _TEXT), ("paper, constant → stochastic, %", _TEXT), ("size", _WIDE)],
        [
            (
                row["setting"],
                _training(row),
                _counts(row),
                _percent(row, "constant_error"),
                _percent(row, "compared_error"),
                f"{100 * row['difference']:+.2f}" if "difference" in row else "",
                _verdict(row),
                _paper(row, "error", lambda error: f"{100 * error:.2f}"),
                _size("full size", row["mark"]),
            )
            for row in rows
        ],
    )


def table2_html(rows: Iterable[Mapping[str, Any]]) -> str:
    """Measured training times beside the paper's."""
    numbers = ("n", "constant depth", "this training", "saving")
    return _table(
        [("setting", _WIDE), ("training", _WIDE)]
        + [(title, _NUMBER) for title in numbers]
        + [("paper, constant → stochastic", _WIDE), ("hardware", _WIDE), ("size", _WIDE)],
        [
            (
                row["setting"],
                _training(row),
                _counts(row),
                _time(row, "constant_s"),
                _time(row, "compared_s"),
                f"{100 * row['saving']:.1f} %" if "saving" in row else "",
                _paper(row, "s", duration),
                _machines(row),
                _size("full size", row["mark"]),
            )
            for row in rows
        ],
    )


def degradation_html(rows: Iterable[Mapping[str, Any]]) -> str:
    """Nets with other skips, or none, at constant depth."""
    numbers = ("n", "last training loss", "lowest validation error, %", "test error, %")
    return _table(
        [("setting", _WIDE), ("skip", _TEXT), *((title, _NUMBER) for title in numbers), ("size", _WIDE)],
        [
            (
                row["setting"],
                row["skip"],
                row["n"],
                _spread(row, "last_train_loss", 1, 4),
                _percent(row, "validation_error"),
                _percent(row, "test_error"),
                _size("full size", row["mark"]),
            )
            for row in rows
        ],
    )


def _training(row: Mapping[str, Any]) -> str:
    if "p_L" not in row:
        return "none"
    return kind_of(row).name


def _counts(row: Mapping[str, Any]) -> str:
    constant, stochastic = row["n_constant"], row["n_compared"]
    return str(constant) if constant == stochastic else f"{constant}, {stochastic}"


def _percent(row: Mapping[str, Any], name: str) -> str:
    return _spread(row, name, 100, 2)


def _spread(row: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
    if f"{name}_mean" not in row:
        return "no run"
    sd = f" ± {scale * row[f'{name}_sd']:.{digits}f}" if f"{name}_sd" in row else ""
    return f"{scale * row[f'{name}_mean']:.{digits}f}{sd}"


def _time(row: Mapping[str, Any], name: str) -> str:
    if f"{name}_mean" not in row:
        return "no run"
    sd = f" ± {duration(row[f'{name}_sd'])}" if f"{name}_sd" in row else ""
    return duration(row[f"{name}_mean"]) + sd


def duration(seconds: float) -> str:
    """`12.3 s`, `14 min 05 s` or `20 h 42 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min"


def _verdict(row: Mapping[str, Any]) -> Markup:
    notes = [escape(row[key]) for key in ("verdict", "note") if key in row]
    worse = row.get("difference", 0) > 0
    return Markup(f"<strong>{'; '.join(notes)}</strong>" if worse else "; ".join(notes))


def _paper(row: Mapping[str, Any], unit: str, text: Callable[[float], str]) -> str:
    """What the paper reports, and of what."""
    if "paper_recipe" not in row:
        return ""
    constant, stochastic = (text(row[f"paper_{kind}_{unit}"]) for kind in ("constant", "stochastic"))
    in_text = row.get(f"paper_constant_{unit}_in_text")
    other = f" (text {text(in_text)})" if in_text else ""
    context = f"; context: {row['paper_context']}" if "paper_context" in row else ""
    return f"{constant}{other} → {stochastic} ({row['paper_recipe']}{context})"


def _machines(row: Mapping[str, Any]) -> Markup:
    """With what else keeps their times from comparing."""
    warning = f'<br><strong class="mark">{escape(row["warning"])}</strong>' if "warning" in row else ""
    note = f"<br>{escape(row['note'])}" if "note" in row else ""
    return Markup("<br>".join(map(escape, row["hardware"].split(" | "))) + warning + note)


def _size(full: str, mark: str) -> Markup:
    return Markup(f'<span class="mark">{escape(mark)}</span>' if mark else escape(full))

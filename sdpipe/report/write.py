"""`sdpipe report`: read the runs, then write tables, figures and the page into one folder."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sdpipe.errors import DataError, on_one_line, tell
from sdpipe.files import read_json, replacing_folder, write_json
from sdpipe.report.cells import write_table
from sdpipe.report.constant_depth import with_other_skips
from sdpipe.report.figures import plan_figures
from sdpipe.report.page import Page, page_html
from sdpipe.report.plan import Drawing
from sdpipe.report.plots import Sheet
from sdpipe.report.reading import read_runs
from sdpipe.report.runs import FIRST_COLUMNS, Numbers, Run, repetitions, to_row
from sdpipe.report.settings import Setting, group
from sdpipe.report.tables import TableRow, degradation_table, table1, table2

_MARKER = "report.json"  # says that a report wrote the folder, and what


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the report of all runs in `folders`; a line for each run that was left out.

    Raises DataError if there is no run, or if `out` holds anything that a report did not write.
    """
    try:
        out = out.resolve()
    except RuntimeError as error:  # so Python 3.11 says it
        raise DataError(f"{out}: expected a folder, found a loop of links") from error
    with _turn_in(out.parent):
        _check_out(out)
        runs, problems = read_runs(folders)
        for line in repetitions(runs):
            tell(f"note: {on_one_line(line)}")
        settings = group(runs)
        with replacing_folder(out) as beside:
            _write(beside, runs, settings, problems)
            names = sorted(path.name for path in beside.iterdir())
            write_json(beside / _MARKER, {"written_by": "sdpipe report", "files": [*names, _MARKER]})
    return problems


@contextmanager
def _turn_in(folder: Path) -> Iterator[None]:
    """Two reports that write into one folder take turns, and neither replaces what the other reads.

    The lock is on the folder itself: it may be anywhere, and a lock's own file would stay in it.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network's disk may lock no folders; there nothing else is done
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
        for each in missing:  # those that nothing came into
            with suppress(OSError):
                each.rmdir()


def _check_out(out: Path) -> None:
    """What stands in the folder is going to be replaced: it must be a report's, all of it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: expected a folder, found a file")
    found = {path.name for path in out.iterdir()}
    files = read_json(out / _MARKER).get("files") if _MARKER in found else []
    ours = set(map(str, files)) if isinstance(files, list) else set()
    if foreign := sorted(found - ours):
        raise DataError(
            f"{out}: not replaced, since no report wrote {foreign[0]}; expected an empty folder or a report"
        )


def _write(folder: Path, runs: Sequence[Run], settings: Sequence[Setting], problems: Sequence[str]) -> None:
    write_table(folder / "runs.csv", [to_row(run) for run in runs], FIRST_COLUMNS)
    write_table(folder / "history.csv", list(_long((run.run, run.history) for run in runs)))
    if any(run.ensemble for run in runs):
        write_table(folder / "ensemble.csv", list(_long((run.run, run.ensemble) for run in runs)))
    first, second = table1(settings), table2(settings)
    _write_results(folder / "table1.csv", first)
    _write_results(folder / "table2.csv", second)
    degraded = degradation_table(with_other_skips(settings))
    if degraded:
        _write_results(folder / "degradation.csv", degraded)
    drawings, not_drawn = plan_figures(settings)
    images = [_draw(folder, drawing) for drawing in drawings]
    page = Page(
        runs=runs,
        table1=first,
        table2=second,
        degradation=degraded,
        figures=list(zip(drawings, images, strict=True)),
        not_drawn=not_drawn,
        problems=problems,
    )
    (folder / "index.html").write_text(page_html(page), encoding="utf-8")


def _write_results(path: Path, rows: Sequence[TableRow]) -> None:
    """Empty text, such as the mark of what is of full size, as an empty cell, since nothing reads it back."""
    columns = dict.fromkeys(key for row in rows for key in row)
    write_table(path, [{key: value for key, value in row.items() if value != ""} for row in rows], columns)


def _long(tables: Iterable[tuple[str, Sequence[Numbers]]]) -> Iterable[dict[str, object]]:
    return ({"run": name, **row} for name, rows in tables for row in rows)


def _draw(folder: Path, drawing: Drawing) -> bytes:
    path = folder / f"{drawing.name}.png"
    assert not path.exists(), f"two figures of one name: {drawing.name}"
    drawing.draw(Sheet(path=path, title=drawing.title, mark=drawing.mark))
    return path.read_bytes()

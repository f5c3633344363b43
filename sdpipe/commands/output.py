"""What `predict` writes: a line, a JSON object or a CSV row for each picture, and how far it is."""

import io
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from sdpipe.errors import SdpipeError, on_one_line

Result = Any
"""A Prediction or a Failure of sdpipe.runtime, which is not imported here: help must start fast."""

_EVERY_S = 0.2
_MAX_ENDINGS = 5


def is_failure(result: Result) -> bool:
    """Whether there is a reason in place of labels."""
    return hasattr(result, "code")


def choose_printer(
    as_json: bool, as_csv: bool, top_k: int, *, with_uncertainty: bool
) -> Callable[[Result], None]:
    """What writes a result to standard output; for CSV, the header is written now.

    Raises SdpipeError as `check_is_read` does.
    """
    check_is_read()
    if as_csv:
        return _csv_printer(top_k, with_uncertainty)
    return _print_json if as_json else lambda result: _print_line(result, top_k)


def check_is_read() -> None:
    """Raise SdpipeError where standard output is closed, and all results would be lost."""
    if sys.stdout is None:
        raise SdpipeError("standard output is closed")


def _print_json(result: Result) -> None:
    if is_failure(result):
        line = {"file": result.file, "ok": False, "error": result.code, "message": result.message}
    else:
        top = [{"label": label, "probability": probability} for label, probability in result.top]
        line = {"file": result.file, "ok": True, **top[0], "top": top}
        if result.uncertainty is not None:
            line["uncertainty"] = vars(result.uncertainty)
    click.echo(json.dumps(line))


def _print_line(result: Result, top_k: int) -> None:
    if is_failure(result):
        return
    label, probability = result.top[0]
    spread = "" if result.uncertainty is None else f" {_spread(result.uncertainty)}"
    click.echo(f"{on_one_line(result.file)}: {on_one_line(label)} {probability:.4f}{spread}")
    if top_k > 1:
        for label, probability in result.top:
            click.echo(f"    {on_one_line(label):<20} {probability:.4f}")


def _spread(uncertainty: Any) -> str:
    num_agreeing = round(uncertainty.agreement * uncertainty.members)
    return f"+- {uncertainty.probability_std:.4f} ({num_agreeing} of {uncertainty.members})"


def _csv_printer(top_k: int, with_uncertainty: bool) -> Callable[[Result], None]:
    """A row a picture, as a spreadsheet wants it; the second label and those behind are the last columns."""
    import csv

    writer = csv.writer(_StandardOutput(), lineterminator="\n")
    more = [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "probability")]
    spread = ["members", "probability_mean", "probability_std", "agreement"] * with_uncertainty
    writer.writerow(["file", "ok", "label", "probability", "error", "message", *more, *spread])

    def print_row(result: Result) -> None:
        file = _as_text(result.file, "./")  # the same file
        if is_failure(result):
            writer.writerow([file, "false", "", "", result.code, result.message, *[""] * len(more + spread)])
        else:
            cells = [cell for label, value in result.top for cell in (_as_text(label, "'"), value)]
            judged = [getattr(result.uncertainty, name) for name in spread]
            writer.writerow([file, "true", *cells[:2], "", "", *cells[2:], *judged])

    return print_row


class _StandardOutput:
    """As click writes to it: line by line, in step with standard error."""

    def write(self, text: str) -> None:
        click.echo(text, nl=False)


def _as_text(name: str, mark: str) -> str:
    """On one line, with a mark before what a spreadsheet would compute, such as =1+1; a number stays.

    https://owasp.org/www-community/attacks/CSV_Injection
    """
    cell = on_one_line(name)
    is_formula = re.match(r"[=+@-].", cell) and not re.fullmatch(r"[+-][\d.]+", cell)
    return mark + cell if is_formula else cell


def passed_over(endings: Counter[str]) -> str:
    """What is said of files in folders that are no pictures by their names."""
    most = endings.most_common(_MAX_ENDINGS)
    kinds = ", ".join(f"{count:,} {on_one_line(ending) or 'without ending'}" for ending, count in most)
    more = ", ..." * (len(endings) > _MAX_ENDINGS)
    return f"note: files in folders that are no pictures, by their names, were left out: {kinds}{more}"


def without_user(url: str) -> str:
    """A URL with *** for user and password, which stand before its path; a path may have an @, too."""
    return re.sub(r"(?<=://)[^/?#]*@", "***@", url)


class Progress:
    """How many are done, on standard error, while results go to a file or a pipe; silent otherwise."""

    def __init__(self, count: Callable[[], int]) -> None:
        """count: how many there will be; it is called only if that is shown."""
        self._is_shown = sys.stderr is not None and sys.stderr.isatty() and not sys.stdout.isatty()
        self._total = count() if self._is_shown else 0
        self._num_done = 0
        self._started = self._last = time.monotonic()

    def over(self, results: Iterable[Result]) -> Iterator[Result]:
        """Pass the results on, and show how far it is five times a second at most."""
        try:
            for result in results:
                yield result
                self._num_done += 1
                if self._is_shown and time.monotonic() - self._last >= _EVERY_S:
                    self._last = time.monotonic()
                    self._show()
        finally:  # also of an interruption, whose line comes next
            if self._is_shown:
                self._show()
                click.echo(err=True)

    def note(self, line: str) -> None:
        """A line of its own on standard error."""
        click.echo(f"\r\x1b[K{line}" if self._is_shown else line, err=True)

    def _show(self) -> None:
        rate = self._num_done / max(time.monotonic() - self._started, 1e-3)
        left_s = max(0, self._total - self._num_done) / max(rate, 1e-3)
        text = f"{self._num_done:,} of {self._total:,} images, {rate:,.0f}/s, {left_s:,.0f} s left"
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)


@contextmanager
def only_our_lines() -> Iterator[None]:
    """Keep what libraries in C write to standard error of their own (libtiff) off it, and print any name.

    What Python writes there stays; with SDPIPE_DEBUG=1 all does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that an ASCII terminal lacks
    before = sys.stderr
    if os.environ.get("SDPIPE_DEBUG") == "1" or before is None:
        yield
        return
    before.flush()
    encoding, errors = before.encoding, before.errors
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    if before is sys.__stderr__:
        sys.stderr = os.fdopen(os.dup(kept), "w", buffering=1, encoding=encoding, errors=errors)
    try:
        yield
    finally:
        if sys.stderr is not before:
            sys.stderr.close()
            sys.stderr = before
        os.dup2(kept, 2)
        os.close(kept)

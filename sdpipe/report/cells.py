"""CSV files that read back as what was written: text as it is, everything else as JSON."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpipe.errors import DataError
from sdpipe.files import replacing

Row = Mapping[str, Any]


def write_table(path: Path, rows: Sequence[Row], first: Iterable[str] = ()) -> None:
    """Write rows with the columns `first`, then those of the rows, in the order of their first appearance.

    A key that a row lacks is an empty cell.
    """
    columns = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row[key]) if key in row else "" for key in columns] for row in rows)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_table` wrote, empty cells left out.

    Raises DataError if the file is missing or is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:  # spreadsheets begin with a mark
            lines = list(csv.reader(stream, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not lines or any(len(line) != len(lines[0]) for line in lines):
        raise DataError(f"{path}: expected a header and rows of its length")
    return [
        {key: _value(cell) for key, cell in zip(lines[0], line, strict=True) if cell} for line in lines[1:]
    ]


_FORMULA = re.compile(r"\s*[=+@-].", re.DOTALL)
"""What a spreadsheet would compute, as in `predict --csv`; in JSON's quotes it is text there, too."""


def _cell(value: Any) -> str:
    if isinstance(value, str) and value and _value(value) == value and not _FORMULA.match(value):
        return value
    return json.dumps(value)


# As spreadsheets and pandas write what JSON calls true and false.
_TRUTHS = {"True": True, "False": False, "TRUE": True, "FALSE": False}


def _value(cell: str) -> Any:
    if cell in _TRUTHS:
        return _TRUTHS[cell]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell

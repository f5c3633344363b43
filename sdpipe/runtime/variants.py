"""The variants of a network side by side, as `variants.csv` beside its files has them."""

import csv
import io
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdpipe.errors import ModelError

NAME = "variants.csv"
TEXTS = ("variant", "path", "fingerprint")
NUMBERS = ("test_error", "bytes", "batch_1_ms", "batch_64_ms", "disagreements_with_fp32")
COLUMNS = (*TEXTS, *NUMBERS, "parity")

_MAX_CHARACTERS = 2**20  # a row has about 120


def read_variants(model: Path, fingerprint: str) -> list[dict[str, Any]]:
    """The rows of the variants.csv beside a model file, below it in `variants/`, or above it; else none.

    fingerprint: of the model's training; a table may stand there that is about another one, or of other
    columns. Empty cells are None. Raises ModelError if the file has our columns and is no such table.
    """
    # Where the name stands first: DVC may make each file a link into its cache.
    for folder in dict.fromkeys((model.absolute().parent, model.resolve().parent)):
        for place in (folder, folder / "variants", folder.parent):
            if (place / NAME).is_file():
                rows = read_table(place / NAME)
                if any(row["fingerprint"] == fingerprint for row in rows):
                    return rows
    return []


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a variants.csv; none if it has other columns. Raises ModelError if it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as stream:
            text = stream.read(_MAX_CHARACTERS + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not _has_our_columns(text):
        return []
    if len(text) > _MAX_CHARACTERS:
        raise ModelError(f"{path}: over {_MAX_CHARACTERS:,} characters, no table of variants")
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return [_row(cells) for cells in rows]
    except (ValueError, csv.Error) as error:
        raise ModelError(f"{path}: line {rows.reader.line_num}: {error}") from error


def _has_our_columns(text: str) -> bool:
    try:
        return set(COLUMNS) <= set(next(csv.reader(io.StringIO(text, newline="")), ()))
    except csv.Error:
        return False


def _row(cells: dict[str, str | None]) -> dict[str, Any]:
    """Raises ValueError for what cannot be in a row."""
    if None in cells.values():
        raise ValueError("too few cells")
    texts = {name: cells[name] for name in TEXTS}
    return {**texts, **{name: _value(name, str(cells[name]).strip()) for name in (*NUMBERS, "parity")}}


def _value(name: str, cell: str) -> float | int | bool | None:
    if not cell:
        return None
    if name == "parity":
        if cell.lower() in ("true", "false"):
            return cell.lower() == "true"
        raise ValueError(f"parity: expected true or false, got {cell[:40]!r}")
    with suppress(ValueError):
        if math.isfinite(value := float(cell)):
            return int(cell) if cell.isdigit() else value
    raise ValueError(f"{name}: expected a number, got {cell[:40]!r}")

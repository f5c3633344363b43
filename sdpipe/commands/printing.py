"""How commands write tables."""

from collections.abc import Sequence

from sdpipe.errors import on_one_line


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for people: the first column to the left, the others, of figures, to the right."""
    table = [[on_one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(map(str.rjust, row[1:], widths[1:]))]).rstrip() for row in table
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the same as a Markdown table."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return [
        "| " + " | ".join(on_one_line(cell).replace("|", r"\|") for cell in row) + " |"
        for row in (header, marks, *rows)
    ]

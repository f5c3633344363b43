"""How commands write tables."""

from collections.abc import Sequence

from sdpipe.errors import on_one_line


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 1) -> list[str]:
    """The lines of a table for people: `num_words` columns to the left, those of figures to the right."""
    table = [[on_one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    words, figures = widths[:num_words], widths[num_words:]
    return [
        "  ".join([*map(str.ljust, row, words), *map(str.rjust, row[num_words:], figures)]).rstrip()
        for row in table
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the same as a Markdown table."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return [
        "| " + " | ".join(on_one_line(cell).replace("|", r"\|") for cell in row) + " |"
        for row in (header, marks, *rows)
    ]

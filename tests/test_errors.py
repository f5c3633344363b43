"""What goes wrong outside sdpipe is one plain line and an exit status; what is our bug is a traceback."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sdpipe.cli import main

ODD = "new\nline\x1b[31m"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def check_one_line(result: Result, start: str, code: int = 1) -> None:
    """An exit that was meant, and nothing but one line of printable characters that begins so."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code
    (line,) = result.stderr.removesuffix("\n").split("\n")
    assert line.isprintable()
    assert line.startswith(start)


@pytest.mark.parametrize(
    "arguments",
    [
        ("recipe", "show", ODD),
        ("inspect", f"{ODD}.onnx"),
        ("track", f"models/{ODD}"),
        ("report", ODD),
        ("prune", ODD),
        ("triton", "--model", f"{ODD}.onnx", "--out", "out"),
        ("benchmark", f"{ODD}.onnx"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_odd_names_stay_on_one_line(project: Path, arguments: tuple[str, ...]) -> None:
    """A newline and a terminal code, in the name of a recipe, a file or a folder."""
    (project / f"{ODD}.onnx").write_text("no model")
    result = call(*arguments)
    check_one_line(result, "error: ")
    assert r"new\nline\x1b[31m" in result.stderr

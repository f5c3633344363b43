"""What goes wrong outside sdpipe is one plain line and an exit status; what is our bug is a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, random_images
from PIL import Image
from report_runs import write_run

from sdpipe import errors
from sdpipe.cli import main
from sdpipe.errors import errors_on_one_line, without_passwords

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://u:p@h/a?password=p&b=1 and u@h", "at http://***@h/a?password=***&b=1 and u@h"),
        ("http://u@h/a", "http://***@h/a"),
        ("postgresql://u:p/q@r@h/a", "postgresql://***@h/a"),
        ("https://h/package@1.2/a.png", "https://h/package@1.2/a.png"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    """And nothing else of a URL is left out, such as a version in its path."""
    assert without_passwords(text) == shown


@pytest.fixture
def places(project: Path) -> Path:
    """A file where a folder is expected, a link that leads to itself, and one that leads nowhere."""
    (project / "file").write_text("mine")
    (project / "loop").symlink_to("loop")
    (project / "nowhere").symlink_to("gone/too")
    return project


PLACES = ("file/below", "loop/below", "nowhere", "x" * 300)


@pytest.mark.parametrize("place", [*PLACES, "loop", "file"])
def test_a_model_repository_that_cannot_be_written(places: Path, model_path: Path, place: str) -> None:
    check_one_line(call("triton", "--model", model_path, "--out", place), "error: ")


@pytest.mark.parametrize("place", [*PLACES, "loop", "file"])
def test_a_report_that_cannot_be_written(places: Path, place: str) -> None:
    write_run(places / "models" / "a")
    result = call("report", "--out", place)
    if place != "nowhere":  # the folder that it leads to is made
        check_one_line(result, "error: ")
    assert (places / "file").read_text() == "mine"


@pytest.mark.parametrize("place", [f"{place}/b.json" for place in PLACES])
def test_figures_that_cannot_be_written(places: Path, model_path: Path, place: str) -> None:
    check_one_line(call("benchmark", model_path, "--json", place), "error: ")


@pytest.mark.parametrize(
    ("options", "named"),
    [(("--out", "file/x"), "file/x/pareto.csv"), (("--max-error", 1, "--copy-to", "file/x/y"), "file/x/y")],
)
def test_prune_says_first_that_it_cannot_write(places: Path, options: tuple[object, ...], named: str) -> None:
    (places / "run").mkdir()
    (places / "run" / "weights.safetensors").write_text("looked at behind it")
    check_one_line(call("prune", "run", *options), f"error: [Errno 20] Not a directory: '{named}'")


def test_the_systems_word_on_a_file_is_one_line_and_on_sdpipes_own_a_traceback() -> None:
    """Which OSErrors are the world's: those that name a file which is not sdpipe's, and a full disk."""
    for error in (FileNotFoundError(2, "gone", "a/b"), OSError(36, "long", b"a"), OSError(28, "full")):
        with pytest.raises(SystemExit), errors_on_one_line():
            raise error
    own = str(Path(errors.__file__).with_name("recipes.yaml"))
    for error in (FileNotFoundError(2, "gone", own), OSError(9, "bad descriptor"), OSError("no number")):
        with pytest.raises(OSError), errors_on_one_line():  # noqa: PT011
            raise error


COMMANDS = [(), ("--help",), ("--version",), ("predict", "--help"), ("inspect", "MODEL"), ("doctor",)]
COMMANDS += [("inspect", "MODEL", "--json"), ("recipe", "list"), ("predict", "p.png", "--model", "MODEL")]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_disk_behind_standard_output_is_one_line(
    project: Path, model_path: Path, arguments: tuple[str, ...]
) -> None:
    """By the system's own full device, whatever it is that prints."""
    Image.fromarray(random_images(1)[0, ..., 0]).save("p.png")
    words = [str(model_path) if word == "MODEL" else word for word in arguments]
    command = [sys.executable, "-c", "from sdpipe.cli import main; main(prog_name='sdpipe')", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=ENVIRONMENT
        )
    if arguments:
        assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")
    else:  # called wrong: the help is on standard error
        assert done.returncode == 2


def test_options_that_name_files_which_cannot_be(project: Path, model_path: Path) -> None:
    """A name that is too long, seen while the options are read."""
    check_one_line(call("inspect", "x" * 300), "error: [Errno 36] File name too long")
    check_one_line(call("predict", "p.png", "--show", f"{'x' * 300}.png"), "error: [Errno 36] File name")


def test_show_neither_waits_for_a_pipe_nor_follows_a_link(project: Path, model_path: Path) -> None:
    os.mkfifo("pipe.png")
    Path("nowhere.png").symlink_to("gone")
    Path("folder.png").mkdir()
    for name in ("pipe.png", "nowhere.png", "folder.png"):
        result = call("predict", "p.png", "--model", model_path, "--show", name)
        assert result.exit_code == 2
        assert f"{name} exists and is no contact sheet; it is left alone" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("inspect", ODD), (ODD,), ("predict", "p.png", "--show", ODD), ("doctor", f"--{ODD}")]
)
def test_called_wrong_is_said_in_printable_letters(project: Path, arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert r"new\nline\x1b[31m" in result.stderr
    assert all(line.isprintable() for line in result.stderr.split("\n"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ensemble", "--members", "\u00b2"), "expected numbers"),
        (("ensemble", "--members", "0"), "expected numbers"),
        (("ensemble", "--members", "1001"), "from 1 to 1000"),
        (("ensemble", "--members", "9" * 5000), "expected numbers"),
        (("prune", "--keep", "\u00b2"), "expected numbers"),
        (("prune", "--keep", "9" * 5000), "expected numbers"),
        (("benchmark", "--batch-sizes", "9" * 5000), "expected numbers"),
        (("predict", "p.png", "--batch-size", "9" * 20), "1<=x<=4096"),
        (("predict", "p.png", "--uncertainty", "9" * 20), "2<=x<=1000"),
        (("prune", "--batch-size", "9" * 20), "1<=x<=4096"),
        (("triton", "--out", "x", "--max-batch-size", "9" * 20), "1<=x<=4096"),
        (("recipe", "show", "digits", "--seeds", "9" * 20), "1<=x<=1000"),
        (("benchmark", "--repeats", "9" * 20), "1<=x<=1000000"),
    ],
)
def test_numbers_that_are_none_or_far_too_large(
    project: Path, model_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    """Digits of other scripts, and numbers that no memory or life would be enough for."""
    result = CliRunner().invoke(main, arguments, env={"SDPIPE_MODEL": str(model_path)})
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("recipe", "show", "imagenet"), ("recipe", "list"), ("predict", "-h")])
def test_a_reader_who_has_had_enough_is_no_error(arguments: tuple[str, ...]) -> None:
    """`sdpipe ... | head`: nothing on standard error, neither then nor when the interpreter ends."""
    reading, writing = os.pipe()
    os.close(reading)
    script = "from sdpipe.cli import main; main(prog_name='sdpipe')"
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("cause", "code", "text"), [(KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(143), 143, "")]
)
def test_an_import_that_was_interrupted_is_an_interruption(
    capsys: pytest.CaptureFixture[str], cause: BaseException, code: int, text: str
) -> None:
    """A module in C, as onnxruntime's, ends with an ImportError whatever ended its start."""
    with pytest.raises(SystemExit) as ended, errors_on_one_line():
        raise ImportError("initialization failed") from cause
    assert ended.value.code == code
    assert capsys.readouterr().err == text
    with pytest.raises(ImportError, match="no module"), errors_on_one_line():
        raise ImportError("no module")

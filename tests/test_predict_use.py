"""`sdpipe predict` as people use it: folders, tables, contact sheets, progress."""

import csv
import errno
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, SIZE, export_to, random_images
from encoded_pictures import write_folder
from PIL import Image

from sdpipe.cli import main
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.contact_sheet import ContactSheet, is_contact_sheet
from sdpipe.runtime.predictor import Prediction, predict
from sdpipe.runtime.sources import Failure
from sdpipe.training.weights import Weights

CLI = "from sdpipe.cli import main; main(prog_name='sdpipe')"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["predict", *(str(argument) for argument in arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


def test_many_pictures_keep_their_order(folder: Path, rgb_model_path: Path) -> None:
    """Decoded by several threads and in batches, the n-th result is the n-th file's, failures included."""
    artifact = open_artifact(rgb_model_path, "cpu")
    names = [str(folder / f"{at}.png") for at in (3, 0, 4, 1, 2)] + [str(folder / "bad.png")]
    files: list[str | Failure] = [*names * 20]
    results = list(predict(artifact, files, top_k=3, batch_size=7))
    assert [result.file for result in results] == files
    alone = {name: next(predict(artifact, [name], top_k=3, batch_size=1)) for name in names}
    for result in results:
        expected = alone[result.file]
        assert isinstance(result, Prediction) == isinstance(expected, Prediction)
        if isinstance(result, Prediction) and isinstance(expected, Prediction):
            assert [label for label, _ in result.top] == [label for label, _ in expected.top]
            assert dict(result.top) == pytest.approx(dict(expected.top), abs=1e-6)


def test_files_are_taken_as_they_are_needed(folder: Path, rgb_model_path: Path) -> None:
    """No list of a million files is read ahead: at most three batches are on their way."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(folder / "0.png")

    results = predict(open_artifact(rgb_model_path, "cpu"), endless(), top_k=1, batch_size=4)
    for _ in range(40):
        next(results)
    assert taken <= 40 + 3 * 4 + 2


def test_csv_is_a_table(folder: Path, rgb_model_path: Path) -> None:
    """A header, a row a picture, the second label in columns of its own; the numbers are those of --json."""
    odd = folder / 'a,b\n"c".png'
    (folder / "0.png").rename(odd)
    arguments = (folder, "--model", rgb_model_path, "--top-k", 2)
    result = call(*arguments, "--csv")
    assert result.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert result.stdout.splitlines()[0] == "file,ok,label,probability,error,message,label_2,probability_2"
    assert len(result.stdout.splitlines()) == 7
    objects = [json.loads(line) for line in call(*arguments, "--json").stdout.splitlines()]
    for row, found in zip(rows, objects, strict=True):
        assert row["file"] == found["file"].replace("\n", "\\n")
        assert row["ok"] == str(found["ok"]).lower()
        if found["ok"]:
            assert (row["label"], float(row["probability"])) == (found["label"], found["probability"])
            assert float(row["probability_2"]) == found["top"][1]["probability"]
        else:
            assert (row["error"], row["label"]) == ("not_an_image", "")
    assert call(*arguments, "--csv", "--json").exit_code == 2


def test_a_spreadsheet_computes_no_file_name(
    folder: Path, rgb_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "0.png").rename(folder / "=1+1.png")
    rows = list(csv.DictReader(io.StringIO(call("=1+1.png", "--model", rgb_model_path, "--csv").stdout)))
    assert rows[0]["file"] == "./=1+1.png"


@pytest.mark.slow
def test_a_spreadsheet_computes_no_class_name(folder: Path, rgb_weights: Weights) -> None:
    """A leading apostrophe makes text of it, as OWASP advises; numbers stay, and --json is as it is."""
    names = ("=1+1", "-1", "@x")
    model = folder.parent / "odd.onnx"
    export_to(model, replace(rgb_weights, info=replace(rgb_weights.info, class_names=names)))
    arguments = (folder / "0.png", "--model", model, "--top-k", 3)
    (row,) = csv.DictReader(io.StringIO(call(*arguments, "--csv").stdout))
    assert {row["label"], row["label_2"], row["label_3"]} == {"'=1+1", "-1", "'@x"}
    assert {entry["label"] for entry in json.loads(call(*arguments, "--json").stdout)["top"]} == set(names)


def test_the_contact_sheet_shows_the_pictures(folder: Path, rgb_model_path: Path) -> None:
    """Enlarged in whole multiples, in order; a grey tile with the reason for what is no picture."""
    path = folder.parent / "sheet.png"
    result = call(folder, "--model", rgb_model_path, "--show", path)
    assert result.exit_code == 1
    sheet = np.asarray(Image.open(path))
    factor = 160 // SIZE
    pixels = np.repeat(np.repeat(random_images(5, channels=3)[0], factor, 0), factor, 1)
    offset = (160 - SIZE * factor) // 2 + 12
    first = sheet[offset : offset + SIZE * factor, offset : offset + SIZE * factor]
    np.testing.assert_array_equal(first, pixels)
    assert (sheet == 0xB8).all(axis=2).sum() > 160 * 160 // 2
    assert call(folder / "0.png", "--model", rgb_model_path, "--show", path).exit_code == 0  # drawn anew


def test_a_contact_sheet_has_a_limit_and_says_what_it_leaves_out() -> None:
    sheet, few = ContactSheet(), ContactSheet()
    for at in range(sheet.limit + 7):
        result = Failure(file=f"{at}\n€.png", code="x", message="a reason " * 50)
        sheet.add(result)
        if at < sheet.limit:
            few.add(result)
    drawn, without = sheet.draw(), few.draw()
    assert drawn.width == without.width
    footer = np.asarray(drawn)[without.height :]
    assert (footer < 128).any()


def test_a_full_disk_leaves_the_sheet_before(
    folder: Path, rgb_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.parent / "sheet.png"
    arguments = (folder / "0.png", "--model", rgb_model_path, "--show", path)
    assert call(*arguments).exit_code == 0
    before, names = path.read_bytes(), sorted(folder.parent.iterdir())
    save = Image.Image.save

    def fill(image: Image.Image, to: Path, *options: object, **more: object) -> None:
        save(image, to, *options, **more)
        os.truncate(to, 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    result = call(*arguments)
    assert (result.exit_code, result.stderr) == (1, f"error: [Errno 28] No space left on device: '{path}'\n")
    assert path.read_bytes() == before
    assert sorted(folder.parent.iterdir()) == names


def test_a_closed_standard_output_is_an_error(folder: Path, rgb_model_path: Path) -> None:
    predict = [sys.executable, "-c", CLI, "predict", folder / "0.png", "--model", rgb_model_path]
    closed = ["bash", "-c", 'exec "$@" >&-', "bash", *predict]
    done = subprocess.run(closed, stderr=subprocess.PIPE, check=False, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (1, b"error: standard output is closed\n")


def test_show_overwrites_no_picture(folder: Path, rgb_model_path: Path) -> None:
    """`--show a.png b.png` with the sheet's name forgotten must not cost a picture."""
    before = (folder / "0.png").read_bytes()
    for path in (folder / "0.png", folder / "bad.png", folder / "x.jpg", folder / "no" / "x.png"):
        result = call(folder / "1.png", "--model", rgb_model_path, "--show", path)
        assert result.exit_code == 2
    assert (folder / "0.png").read_bytes() == before
    assert not is_contact_sheet(folder / "0.png")


def test_a_contact_sheet_is_no_picture_of_its_folder(folder: Path, rgb_model_path: Path) -> None:
    """Drawn a second time, it would show itself; by its own name it is a picture as any."""
    sheet = folder / "sheet.png"
    for pictures in (folder, folder / "*.png", folder / ".." / folder.name):
        for _ in range(2):
            result = call(pictures, "--model", rgb_model_path, "--show", sheet)
            assert result.stdout.count("\n") == 5
            assert "sheet.png" not in result.output
    assert "sheet.png" in call(sheet, "--model", rgb_model_path, "--show", sheet).stdout
    assert "sheet.png" in call(folder, "--model", rgb_model_path).stdout


def run_in_terminal(command: list[str], stdout: int) -> str:
    """What comes out of standard error when that is a terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(command, stdout=stdout, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # EIO: the terminal's other end is closed
            break
        text += part
    os.close(ours)
    done.wait()
    return text.decode()


def test_progress_is_for_terminals(folder: Path, rgb_model_path: Path) -> None:
    """A line with the total while results go elsewhere; errors stay whole; nothing without a terminal."""
    command = [sys.executable, "-c", CLI, "predict", str(folder), "--model", str(rgb_model_path)]
    shown = run_in_terminal(command, subprocess.DEVNULL)
    assert "6 of 6 images, " in shown
    assert f"\x1b[Kerror: {folder / 'bad.png'}: not a picture in a format that is read\r\n" in shown
    plain = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert plain.stderr == f"error: {folder / 'bad.png'}: not a picture in a format that is read\n"


def test_only_our_lines_reach_standard_error(folder: Path, rgb_model_path: Path) -> None:
    """libtiff prints of its own what it makes of a damaged file; one line is enough."""
    path = folder / "torn.tif"
    Image.fromarray(random_images(1, channels=3)[0]).save(path, compression="tiff_lzw")
    raw = bytearray(path.read_bytes())
    raw[8:60] = b"\xff" * 52
    path.write_bytes(raw)
    command = [sys.executable, "-c", CLI, "predict", str(path), "--model", str(rgb_model_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    loud = {**ENVIRONMENT, "SDPIPE_DEBUG": "1"}
    assert len(subprocess.run(command, capture_output=True, check=False, env=loud).stderr.splitlines()) > 1
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {path}: damaged")


def test_names_that_the_terminal_cannot_write(folder: Path, rgb_model_path: Path) -> None:
    """Letters outside its encoding, and bytes that are no UTF-8: escaped, never a traceback."""
    (folder / "0.png").rename(folder / "é.png")
    (folder / "1.png").rename(folder / os.fsdecode(b"\xff.png"))
    for form in ([], ["--csv"], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", CLI, "predict", str(folder), "--model", str(rgb_model_path), *form],
            capture_output=True, check=False, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert done.returncode == 1
        assert b"Traceback" not in done.stderr
        assert done.stdout.count(b"\n") >= 5


def test_standard_input_that_gives_nothing_is_one_line(rgb_model_path: Path) -> None:
    """One that does not block and has nothing yet, and one that is open for writing."""
    command = [sys.executable, "-c", CLI, "predict", "-", "--model", str(rgb_model_path)]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    try:
        for stdin, expected in (
            (reading, "standard input has nothing to read yet"),
            (writing, "standard input cannot be read: "),
        ):
            done = subprocess.run(
                command, stdin=stdin, capture_output=True, text=True, check=False, env=ENVIRONMENT
            )
            assert done.returncode == 1
            assert done.stderr.startswith(f"error: -: {expected}")
            assert len(done.stderr.splitlines()) == 1
    finally:
        os.close(reading)
        os.close(writing)


def test_verify_asks_the_manifest(folder: Path, rgb_model_path: Path, tmp_path: Path) -> None:
    """predict and inspect refuse in one line without a manifest, and go on with one."""
    model = tmp_path / "model.onnx"
    model.write_bytes(rgb_model_path.read_bytes())
    for command in (["predict", str(folder / "0.png"), "--model", str(model)], ["inspect", str(model)]):
        refused = CliRunner().invoke(main, [*command, "--verify"])
        assert refused.exit_code == 1
        assert refused.stderr.startswith(f"error: {model}: no SHA256SUMS")
        assert len(refused.stderr.splitlines()) == 1
    listed = subprocess.run(
        ["sha256sum", "model.onnx"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (tmp_path / "SHA256SUMS").write_text(listed.stdout)
    for command in (["predict", str(folder / "0.png"), "--model", str(model)], ["inspect", str(model)]):
        assert CliRunner().invoke(main, [*command, "--verify"]).exit_code == 0


@pytest.mark.slow
def test_a_prediction_starts_no_program_and_opens_no_connection(folder: Path, rgb_model_path: Path) -> None:
    """By strace, with its threads: one execve, the interpreter itself; no socket, no connect."""
    trace = folder.parent / "trace"
    command = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=execve,execveat,connect,socket"]
    predicting = [sys.executable, "-c", CLI, "predict", str(folder), "--model", str(rgb_model_path)]
    done = subprocess.run([*command, *predicting], capture_output=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 1, done.stderr
    lines = [line for line in trace.read_text().splitlines() if "(" in line]
    assert len(lines) == 1, lines
    assert "execve(" in lines[0]

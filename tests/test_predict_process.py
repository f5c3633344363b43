"""`sdpipe predict` as a process: its threads, its standard error, the end of its progress line."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from encoded_pictures import write_folder
from PIL import Image
from pillow_corpus import measure_each, run_command
from test_predict_urls import listening
from test_predict_use import CLI, ENVIRONMENT, call, run_in_terminal

from sdpipe.runtime import predictor
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.predictor import Prediction, predict
from sdpipe.runtime.sources import Failure

NUM_URLS = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


def test_as_many_threads_as_this_process_may_use(
    rgb_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as many as the machine has cores, which onnxruntime takes by itself and binds to them."""
    options = open_artifact(rgb_model_path, "cpu").session.get_session_options()
    assert options.intra_op_num_threads >= 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: {0})
    assert open_artifact(rgb_model_path, "cpu").session.get_session_options().intra_op_num_threads == 1
    three = open_artifact(rgb_model_path, "cpu", threads=3).session.get_session_options()
    assert three.intra_op_num_threads == 3


def test_a_few_photographs_are_decoded_side_by_side(
    tmp_path: Path, rgb_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight at a time, though a small picture stands first: each waits for the other seven."""
    meeting = threading.Barrier(8)
    decode = predictor.open_picture

    def waiting(source: Path | bytes, *rest: object) -> Image.Image:
        if source != names[0]:
            meeting.wait(20)
        return decode(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor, "open_picture", waiting)
    names = [tmp_path / "0.png", *(tmp_path / f"{at}.png" for at in range(1, 9))]
    Image.new("RGB", (8, 8)).save(names[0])
    for name in names[1:]:
        Image.effect_noise((300, 300), 90).convert("RGB").save(name)
    artifact = open_artifact(rgb_model_path, "cpu")
    results = list(predict(artifact, [str(name) for name in names], top_k=1, batch_size=64))
    assert [type(each) for each in results] == [Prediction] * len(names), results


def test_standard_input_is_read_where_it_can_be_interrupted(
    folder: Path, rgb_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a thread, whatever stands around it, and in its turn."""
    threads: list[threading.Thread] = []

    def read(_most: int) -> bytes:
        threads.append(threading.current_thread())
        return (folder / "0.png").read_bytes()

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=read)))
    refused = Failure(file="refused", code="url_not_allowed", message="")
    names = [refused, "-", refused, str(folder / "0.png")]
    results = list(predict(open_artifact(rgb_model_path, "cpu"), names, top_k=1, batch_size=64))
    assert [each.file for each in results] == [each if isinstance(each, str) else each.file for each in names]
    assert threads == [threading.main_thread()]


class Late(http.server.BaseHTTPRequestHandler):
    """Answers none until all have asked."""

    picture = b""
    meeting = threading.Barrier(NUM_URLS)

    def do_GET(self) -> None:
        self.meeting.wait(20)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.picture)

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def late_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Late.picture = (folder / "0.png").read_bytes()
    with listening(Late, monkeypatch) as address:
        yield address


@pytest.mark.parametrize("batch_size", [1, 64])
def test_urls_are_fetched_side_by_side(late_server: str, rgb_model_path: Path, batch_size: int) -> None:
    """However few cores there are, and however small the batches: they are waited for. Their order stays."""
    urls = [f"{late_server}/{at}.png" for at in range(NUM_URLS)]
    result = call(*urls, "--allow-url", "--model", rgb_model_path, "--batch-size", batch_size)
    assert result.exit_code == 0, result.output
    assert [line.rpartition(": ")[0] for line in result.stdout.splitlines()] == urls


def test_a_closed_standard_error_takes_no_result(folder: Path, rgb_model_path: Path) -> None:
    """As some supervisors start a program."""
    words = [sys.executable, "-c", CLI, "predict", str(folder / "0.png"), "--model", str(rgb_model_path)]
    done = subprocess.run(
        ["sh", "-c", '"$@" 2>&-', "sh", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"{folder / '0.png'}: ")


def test_what_a_folder_holds_beside_pictures_is_noted_once(folder: Path, rgb_model_path: Path) -> None:
    """A telephone's .heic is not passed over in silence; the exit status is that of the pictures."""
    (folder / "bad.png").unlink()
    plain = call(folder, "--model", rgb_model_path)
    assert (plain.exit_code, plain.stderr) == (0, "")
    for name in ("a.heic", "b.HEIC", "notes", ".hidden.txt"):
        (folder / name).write_bytes(b"x")
    noted = call(folder, "--model", rgb_model_path)
    assert (noted.exit_code, noted.stdout) == (0, plain.stdout)
    left_out = "files in folders that are no pictures, by their names, were left out"
    assert noted.stderr == f"note: {left_out}: 2 .heic, 1 without ending\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_line_of_progress(folder: Path, rgb_model_path: Path) -> None:
    many = [str(folder / "0.png")] * 100_000
    command = (
        "import os, signal, threading; from sdpipe.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # whoever runs the tests may ignore it
        "threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start(); "
        f"main(['predict', *['{many[0]}'] * {len(many)}, '--model', '{rgb_model_path}'])"
    )
    started = time.monotonic()
    shown = run_in_terminal([sys.executable, "-c", command], subprocess.DEVNULL)
    assert time.monotonic() - started < 30
    assert "s left\r\ninterrupted\r\n" in shown


def test_the_corpus_is_measured_whatever_its_names_are(tmp_path: Path, rgb_model_path: Path) -> None:
    """tests/pillow_corpus.py, on names of no UTF-8, with a newline or a space at their end."""
    files = [tmp_path / name for name in (os.fsdecode(b"\xe9.png"), "new\nline.png", "space.png ", "text")]
    for path in files[:3]:
        Image.new("RGB", (9, 9)).save(path, "PNG")
    files[3].write_text("no picture")
    assert [line["ok"] for line in run_command(rgb_model_path, files)] == [True, True, True, False]
    figures = measure_each(rgb_model_path, files)
    assert [Path(name) for _, _, name in figures] == files

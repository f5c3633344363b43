"""A server of MLflow that is slow, or whose answer has no end: who waits is told, and not for ever."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock
from loopback import serve
from session_runs import the_run
from test_tracking import RECORD

from sdpipe.cli import main
from sdpipe.errors import TrackingError
from sdpipe.files import work_folder
from sdpipe.track import track_note
from sdpipe.training import tracking
from sdpipe.training.mlflow_store import imported, is_server
from sdpipe.training.run_record import notes, write_note
from sdpipe.training.tracking import LiveTracker, awaited, publish

ENDED = replace(RECORD, status="FAILED", ended_ms=1)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


@pytest.fixture
def dripping_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """It answers with a valid head and then a space every tenth of a second, for 8 s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        over = threading.Event()

        def drip() -> None:
            with suppress(OSError), server.accept()[0] as connection:
                connection.sendall(HEAD)
                for _ in range(80):
                    connection.sendall(b" ")
                    if over.wait(0.1):
                        break

        thread = threading.Thread(target=drip)
        thread.start()
        yield uri
        over.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(30)


@pytest.mark.slow
def test_an_answer_without_end_is_one_line_in_time(
    project: Path, dripping_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time-out is of each read, and every read gets a byte. The note stays."""
    monkeypatch.setattr(tracking, "_CONTACT_S", 1.0)
    write_note(ENDED)
    done = CliRunner().invoke(main, ["track"])
    assert done.exit_code == 1
    assert done.output == f"error: MLflow: no answer from {dripping_server} in 1 s\n"
    assert len(notes()) == 1
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "mlflow")


def test_ctrl_c_ends_the_wait_at_once(project: Path, dripping_server: str) -> None:
    imported()  # which may take longer than until the signal
    write_note(ENDED)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            track_note(notes()[0])
        assert time.perf_counter() - started < 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_server_does_not_say_how_long_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow would sleep as long as Retry-After says, which may be an hour (here 20 s)."""
    with serve() as files:
        files.status = 503
        files.headers["Retry-After"] = "20"
        files.content["/api/2.0/mlflow/experiments/get-by-name?experiment_name=sdpipe"] = b"{}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", files.url)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        started = time.perf_counter()
        with pytest.raises(TrackingError, match="Max retries exceeded"):
            publish(ENDED)
        assert time.perf_counter() - started < 10


def test_who_waits_is_told_once_for_what(
    mlflow_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_TELL_S", 0.2)
    with awaited():
        time.sleep(0.8)
    told = f"waiting for MLflow at sqlite:///{mlflow_store}; a large file may take its time\n"
    assert capsys.readouterr().err == told
    monkeypatch.setattr(tracking, "_TELL_S", 15)
    with awaited():
        pass
    assert not capsys.readouterr().err


def test_a_database_in_a_file_may_take_its_time(mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes seconds, on a busy machine or a network's disk more."""
    monkeypatch.setattr(tracking, "_CONTACT_S", 0.0)
    write_note(ENDED)
    assert CliRunner().invoke(main, ["track"]).exit_code == 0
    assert the_run(mlflow_store).info.status == "FAILED"


def test_a_server_that_hangs_takes_mlflow_from_no_other_process(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who talks to a server takes no lock; here another process holds that of databases in files."""
    monkeypatch.setattr(tracking, "PATIENCE_S", 8.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with FileLock(work_folder() / "mlflow.lock"):
        LiveTracker(RECORD).close("FAILED")
    assert "warning: MLflow: http://127.0.0.1:9: API request" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("http://127.0.0.1:5000", True),
        ("https://mlflow.example.org", True),
        ("databricks", True),
        ("databricks://profile", True),
        ("sqlite:///mlflow.db", False),
        ("postgresql://user@host/mlflow", False),
        ("file:///mlruns", False),
        ("mlruns", False),
    ],
)
def test_only_servers_take_no_turns(uri: str, found: bool) -> None:
    """Two processes that begin together would make a database's tables, or a folder's experiment, twice."""
    assert is_server(uri) == found

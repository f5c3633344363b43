"""MLflow that is silent, gone, misaddressed or broken never stands in the way."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import requests
from conftest import machine, train_config
from loopback import serve
from mlflow import MlflowClient
from mlflow.entities import Run
from servers import wait_until
from test_tracking import RECORD

from sdpipe.data.store import DataSet
from sdpipe.errors import TrackingError
from sdpipe.track import track, track_quietly
from sdpipe.training.mlflow_store import connected, store_uri
from sdpipe.training.run_record import RunRecord, notes, read_note
from sdpipe.training.session import train_run
from sdpipe.training.tracking import LiveTracker, publish, quietly


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield uri


@pytest.mark.slow
def test_a_server_that_never_answers_delays_nothing(
    silent_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An update returns at once; the end waits for its time-out, then warns once and goes on."""
    monkeypatch.setattr("sdpipe.training.tracking.PATIENCE_S", 0.5)
    tracker = LiveTracker(RECORD)
    started = time.perf_counter()
    for _ in range(100):
        tracker.update(RECORD.epochs)
    assert time.perf_counter() - started < 0.5
    tracker.close("FINISHED")
    assert time.perf_counter() - started < 3
    assert capsys.readouterr().err.count("nothing is lost, `sdpipe track` sends it later") == 1
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(30)


def test_no_message_shows_a_password(
    silent_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = silent_server.replace("http://", "http://user:word@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = LiveTracker(RECORD)
    tracker.close("FINISHED", patience_s=0.2)
    monkeypatch.setattr("sdpipe.training.tracking.PATIENCE_S", 0.2)
    quietly(lambda: time.sleep(0.5))
    warnings = capsys.readouterr().err
    assert warnings.count("MLflow: no answer from http://***@127.0.0.1:") == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://user:word@example.org/x")
    with pytest.raises(TrackingError, match="example.org") as raised:
        publish(RECORD)
    assert "word" not in warnings + str(raised.value)


def test_no_server_at_all_is_one_warning(
    project: Path, dataset: DataSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training ends with the same files as ever."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train_run("plain", train_config(epochs=2, milestones=[]), machine(), dataset, "code", project / "out")
    assert (project / "out" / "weights.safetensors").exists()
    assert capsys.readouterr().err.count("warning: MLflow") == 1
    with pytest.raises(TrackingError):
        track(project / "out")
    track_quietly(project / "out")
    assert "nothing is lost" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_that_vanishes_in_mid_run_loses_nothing(
    project: Path, dataset: DataSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real server is killed after the first epoch; the training ends; a new server then gets all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server, folder = start_server(project, port), project / "models" / "plain"

    update = LiveTracker.update

    def update_then_kill(self: LiveTracker, epochs: Sequence[dict[str, float]]) -> None:
        update(self, epochs)
        if len(epochs) == 1:
            wait_until(lambda: any("train_loss" in run.data.metrics for run in found()))
            end_server(server)

    def found() -> list[Run]:
        client = MlflowClient()
        experiment = client.get_experiment_by_name("sdpipe")
        return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))

    monkeypatch.setattr(LiveTracker, "update", update_then_kill)
    train_run("plain", train_config(epochs=4, milestones=[]), machine(), dataset, "code", folder)
    assert capsys.readouterr().err.count("nothing is lost, `sdpipe track` sends it later") == 1
    server = start_server(project, port)
    try:
        assert [run.info.status for run in found()] == ["RUNNING"]
        track(folder)
        (run,) = found()
        history = MlflowClient().get_metric_history(run.info.run_id, "train_loss")
        assert (run.info.status, sorted(row.step for row in history)) == ("FINISHED", [1, 2, 3, 4])
    finally:
        end_server(server)


def start_server(project: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{project / 'server.db'}"]
    server = subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
        except requests.ConnectionError:
            return False

    wait_until(answers)
    return server


def end_server(server: "subprocess.Popen[bytes]") -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.parametrize("place", ["folder", "file/below", "text", "/proc/store.db"])
def test_a_database_that_cannot_be_opened_is_said_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """MLflow tries ten times, for 100 s, and logs each."""
    (project / "folder").mkdir()
    (project / "file").write_text("")
    (project / "text").write_text("no database " * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / place}")
    started = time.perf_counter()
    with pytest.raises(TrackingError, match=rf"^MLflow: sqlite:///{project / place}: [^\n]+$"):
        publish(RECORD)
    assert time.perf_counter() - started < 10


def test_tables_that_cannot_be_made_are_one_warning(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a newer MLflow makes them at this moment: alembic's errors are none of SQLAlchemy's."""
    (project / "shared").mkdir()
    with closing(sqlite3.connect(project / "shared" / "runs.db")) as database:
        database.execute("create table alembic_version (version_num)")
        database.execute("insert into alembic_version values ('newer')")
        database.commit()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/shared/runs.db")
    tracker = LiveTracker(RECORD)
    tracker.update(RECORD.epochs)
    tracker.close("FINISHED")
    said = capsys.readouterr().err
    assert said.count("runs.db: its tables cannot be made: CommandError: ") == said.count("\n") == 1
    assert read_note(notes()[0]).status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("query", ["?timeout=60", "?timeout=60&check_same_thread=false"])
def test_a_database_may_have_options(project: Path, monkeypatch: pytest.MonkeyPatch, query: str) -> None:
    """Those of SQLAlchemy, in the address; its file is made under its own name."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mine.db{query}")
    publish(RunRecord(name="a", fingerprint="f", status="FINISHED", params={}, tags={}))
    assert sorted(path.name for path in project.iterdir()) == [".mine.db.lock", ".sdpipe", "mine.db"]


@pytest.mark.slow
def test_an_empty_file_is_no_store_yet(project: Path) -> None:
    """SQLite takes 0 bytes for a database; it has none of MLflow's tables, and they are made."""
    (project / "mlflow.db").touch()
    publish(RECORD)
    assert (project / "mlflow.db").stat().st_size


@pytest.mark.parametrize(
    ("uri", "means"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{root}/mlflow.db"),
        ("sqlite+pysqlite:///my/runs.db?timeout=60", "sqlite+pysqlite:///{root}/my/runs.db?timeout=60"),
        *((uri, uri) for uri in ("sqlite:////srv/mlflow.db", "sqlite:///file:x.db?uri=true", "http://x/y")),
    ],
)
def test_a_relative_database_is_the_projects(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch, uri: str, means: str
) -> None:
    """Also in the copy that `dvc exp run --temp` and `--queue` work in, and throw away."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store_uri() == means.format(root=project)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///?timeout=60"])
def test_a_store_in_memory_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """Its runs would be gone with the process; no file is made that bears such a name."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match="expected a file; what is in memory is lost"):
        publish(RECORD)
    assert [path.name for path in project.iterdir()] == [".sdpipe"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "beside"), [("jürgen", set()), ("100%25, why?", {"100%2525, why%3F"})])
def test_the_store_is_in_the_project_whatever_its_folder_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, beside: set[str]
) -> None:
    """No folder is made elsewhere, where one may not write; but MLflow makes one for what must be quoted."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    publish(RECORD)
    assert (folder / "mlflow.db").exists()
    assert {path.name for path in tmp_path.iterdir()} == {name, *beside}


def test_an_address_that_is_none_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[bad/x")
    with pytest.raises(TrackingError, match=r"MLflow: http://\[bad/x is no address"):
        publish(RunRecord(name="a", fingerprint="f", status="FINISHED", params={}, tags={}))


def test_a_server_that_answers_something_else_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON of another shape, with 200, as a proxy's page for the login may be."""
    with serve() as files:
        for path in ("get-by-name?experiment_name=sdpipe", "create"):
            files.content[f"/api/2.0/mlflow/experiments/{path}"] = b'{"experiment": 5}'
        monkeypatch.setenv("MLFLOW_TRACKING_URI", files.url)
        with pytest.raises(TrackingError, match="MLflow: http://127.0.0.1"):
            publish(RunRecord(name="a", fingerprint="f", status="FINISHED", params={}, tags={}))


def test_an_answer_that_mlflow_trips_over_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code of an error is a list, which MLflow looks up as a name: TypeError, within MLflow."""
    with serve() as files:
        files.status = 400
        path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=sdpipe"
        files.content[path] = b'{"error_code": ["x"], "message": "y"}'
        monkeypatch.setenv("MLFLOW_TRACKING_URI", files.url)
        with pytest.raises(TrackingError, match="^MLflow: http://127.0.0.1.* makes no sense: TypeError: "):
            publish(RunRecord(name="a", fingerprint="f", status="FINISHED", params={}, tags={}))


def test_a_bug_is_no_fault_of_the_store(mlflow_store: Path) -> None:
    """Neither in our code, nor where ours hands MLflow nonsense: a database gives no odd answers."""
    with pytest.raises(TypeError, match="^ours$"), connected():
        raise TypeError("ours")
    with pytest.raises(AttributeError), connected() as (mlflow, experiment_id):
        mlflow.MlflowClient().create_run(experiment_id, tags=["no mapping"])

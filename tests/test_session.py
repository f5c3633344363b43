"""A training as a process: killed, stopped, refused."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import machine, make_dataset, train_config
from filelock import FileLock
from mlflow import MlflowClient
from session_runs import results, run_to, start, steps_saved, the_run, wait_for_checkpoint, wait_for_the_run

from sdpipe.cli import main
from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import BusyError
from sdpipe.training.interruption import noticing_signals
from sdpipe.training.progress import TrainResult
from sdpipe.training.run_record import notes
from sdpipe.training.session import train_run
from sdpipe.training.trainer import Trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(each, marks=pytest.mark.long) for each in (signal.SIGINT, signal.SIGKILL)),
    ],
)
def test_a_killed_process_is_continued_and_leaves_the_same_files(
    project: Path, mlflow_store: Path, number: signal.Signals
) -> None:
    """The same weights, history and summary; one MLflow run, KILLED in between if it could say so."""
    make_dataset(project / "data")
    epochs = 30
    process = start(project, epochs, every_steps=100)  # of 180
    wait_for_checkpoint(project, process)
    process.send_signal(number)
    sent = time.monotonic()
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert "Traceback" not in errors
    assert not (project / "out").exists()
    if number == signal.SIGKILL:
        assert steps_saved(project) == [100]
    else:
        assert steps_saved(project)[-1] > 100, "the step at the signal is saved"
        assert "continues from here" in out
        assert the_run(mlflow_store).info.status == "KILLED"
    process = start(project, epochs)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "continuing after step" in out
    killed = results(project / "out")

    whole = train_config(epochs=epochs, milestones=[])
    train_run("plain", whole, machine(), open_dataset(project / "data"), "code", project / "out")
    assert results(project / "out") == killed
    assert not list(project.glob(".sdpipe/runs/*/*")), "no unfinished state is left of a finished run"
    assert not notes()
    run = the_run(mlflow_store)
    assert run.info.status == "FINISHED"
    client = MlflowClient(f"sqlite:///{mlflow_store}")
    history = client.get_metric_history(run.info.run_id, "validation_error")
    assert sorted(metric.step for metric in history) == list(range(1, epochs + 1))


@pytest.mark.slow
def test_a_training_stopped_before_mlflow_is_imported_leaves_word(project: Path, mlflow_store: Path) -> None:
    """It waits within its ten seconds; what MLflow did not hear then, `sdpipe track` sends."""
    make_dataset(project / "data")
    process = start(project, 100_000, fault="import")
    wait_for_checkpoint(project, process)
    process.terminate()
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert 5 < time.monotonic() - sent < 10, errors
    assert process.returncode == 143
    assert "nothing is lost, `sdpipe track` sends it later" in errors
    assert CliRunner().invoke(main, ["track"]).output.startswith("run plain, killed: MLflow run ")
    info = the_run(mlflow_store).info
    assert info.status == "KILLED"
    assert info.end_time - info.start_time < 5000, "from before the import to the signal"


@pytest.mark.slow
def test_a_last_state_that_cannot_be_kept_is_no_good_end(project: Path, mlflow_store: Path) -> None:
    """The stage fails, and MLflow says so, too; the checkpoints stay for the next start."""
    make_dataset(project / "data")
    (project / ".sdpipe").mkdir()
    (project / ".sdpipe/finished").touch()  # as a folder on a disk that has gone
    with start(project, 1) as process:
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert ".sdpipe/finished" in errors.splitlines()[-1]
    assert the_run(mlflow_store).info.status == "FAILED"
    assert list((project / ".sdpipe/runs").glob("*/step-*"))


@pytest.mark.slow
def test_a_step_that_does_not_end_is_abandoned(project: Path, mlflow_store: Path) -> None:
    """The grace is 1 s here, 7 s for users; the MLflow run says KILLED all the same."""
    make_dataset(project / "data")
    process = start(project, 3, fault="slow")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()  # "run plain, fingerprint ..."
    wait_for_the_run(mlflow_store)
    process.terminate()
    sent = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < 6
    assert process.returncode == 143
    assert "what was under way did not end in 1 s; a checkpoint, if there is one, is good" in errors
    assert the_run(mlflow_store).info.status == "KILLED"


@pytest.mark.slow
def test_a_tracking_server_that_hangs_does_not_delay_the_end(project: Path) -> None:
    make_dataset(project / "data")
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = start(project, 100_000, MLFLOW_TRACKING_URI=uri)
        wait_for_checkpoint(project, process)
        process.terminate()
        sent = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - sent < 10
    assert process.returncode == 143
    assert errors.count("warning: MLflow: no answer") == 1


def test_a_second_process_on_the_same_run_is_refused_unless_the_first_is_ending(
    project: Path, dataset: DataSet, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(epochs=1, milestones=[])
    train_run("plain", config, machine(), dataset, "code", project / "out")
    (name,) = {json.loads((project / "out" / "train.json").read_text())["fingerprint"]}
    lock = FileLock(project / ".sdpipe" / "runs" / f"{name}.lock", thread_local=False)
    monkeypatch.setattr("sdpipe.training.session.ENDING_S", 0.1)
    with lock, pytest.raises(BusyError, match="run plain"):
        train_run("plain", config, machine(), dataset, "code", project / "out")
    monkeypatch.setattr("sdpipe.training.session.ENDING_S", 60.0)
    with lock:
        threading.Timer(1.0, lock.release).start()
        train_run("plain", config, machine(), dataset, "code", project / "out")


def test_the_clock_of_a_stopped_training_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on after the interruption must not be ended by it."""
    monkeypatch.setattr("sdpipe.training.interruption.GRACE_S", 0.1)
    given_up: list[int] = []
    monkeypatch.setattr(os, "_exit", given_up.append)
    with noticing_signals(lambda: None) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            interruption.end()
    time.sleep(0.3)
    assert given_up == []


def test_a_signal_behind_the_last_step_is_heeded(
    project: Path, dataset: DataSet, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During the final evaluation: exit 143, and the next start has not a step to take."""
    finish = Trainer.finish

    def finish_interrupted(self: Trainer) -> TrainResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(self)

    monkeypatch.setattr(Trainer, "finish", finish_interrupted)
    with pytest.raises(SystemExit, match="143"):
        run_to(project / "out", dataset, epochs=1, milestones=[])
    assert not (project / "out").exists()
    assert the_run(mlflow_store).info.status == "KILLED"
    monkeypatch.setattr(Trainer, "finish", finish)
    monkeypatch.setattr(Trainer, "steps", lambda _self: pytest.fail("a step was taken"))
    run_to(project / "out", dataset, epochs=1, milestones=[])

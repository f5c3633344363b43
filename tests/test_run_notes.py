"""Runs that did not finish, or whose end MLflow did not hear: `sdpipe track` sends them."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import machine, train_config
from filelock import FileLock
from mlflow import MlflowClient
from session_runs import the_run
from test_tracking import RECORD

from sdpipe.cli import main
from sdpipe.data.store import DataSet
from sdpipe.training import tracking
from sdpipe.training.checkpoint import Checkpoint, CheckpointFolder
from sdpipe.training.run_record import RunRecord, notes, read_note, write_note
from sdpipe.training.session import train_run
from sdpipe.training.tracking import LiveTracker, publish

HOUR = 3_600_000  # ms
FURTHER = [*RECORD.epochs, {"train_loss": 0.5}]


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def track(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["track", *arguments])


def test_a_failed_run_that_mlflow_did_not_hear_of_is_sent_later(
    no_server: None, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its epochs, and with the times at which it began and ended."""
    before_ms = time.time() * 1000
    LiveTracker(RECORD).close("FAILED", {"test_error": 0.5})
    after_ms = time.time() * 1000
    assert "nothing is lost, `sdpipe track` sends it later" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    time.sleep(0.1)
    done = track()
    run = the_run(mlflow_store)
    assert (done.exit_code, done.output) == (0, f"run plain, failed: MLflow run {run.info.run_id}\n")
    assert (run.info.status, run.data.metrics) == ("FAILED", {"train_loss": 1.0, "test_error": 0.5})
    assert before_ms - 1 <= run.info.start_time <= run.info.end_time <= after_ms
    assert not notes()
    assert "no finished run" in track().output


def test_a_run_that_was_killed_is_sent_with_what_it_saved(
    project: Path,
    dataset: DataSet,
    no_server: None,
    mlflow_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No word of it reached MLflow or the disk after its last checkpoint."""

    def killed(*_arguments: object, **_more: object) -> None:
        raise SystemExit(137)

    def say_nothing(self: LiveTracker, *_arguments: object, **_more: object) -> None:
        self._put(self._record, last=True)
        self._thread.join(20)  # it dies with its process, and reaches no store that comes later
        assert not self._thread.is_alive()

    config = train_config(milestones=[])
    with monkeypatch.context() as patch:
        patch.setattr("sdpipe.training.session.write_training", killed)
        patch.setattr(LiveTracker, "close", say_nothing)
        with pytest.raises(SystemExit):
            train_run("plain", config, machine(), dataset, "code", project / "out")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert track().output.startswith("run plain, killed: MLflow run ")
    run = the_run(mlflow_store)
    history = MlflowClient(f"sqlite:///{mlflow_store}").get_metric_history(run.info.run_id, "train_loss")
    assert (run.info.status, [metric.step for metric in history]) == ("KILLED", [1, 2, 3])
    assert run.info.end_time <= time.time() * 1000
    # It goes on as the same run, and MLflow has its end.
    train_run("plain", config, machine(), dataset, "code", project / "out")
    assert the_run(mlflow_store).info.status == "FINISHED"
    assert not notes()


def test_what_another_code_saved_of_a_killed_run_is_sent_as_it_is(project: Path, mlflow_store: Path) -> None:
    """Its epochs had a metric that ours lack, and lacked others."""
    write_note(RECORD)
    state = {
        "history": [{"epoch": 1.0, "train_loss": 0.5, "margin": 0.25}],
        "timing": [{"epoch": 1.0, "epoch_s": 2.0, "images_per_s": 100.0}],
    }
    checkpoints = CheckpointFolder(project / ".sdpipe" / "runs" / RECORD.fingerprint, RECORD.fingerprint)
    checkpoints.save(Checkpoint(num_steps=6, tensors={}, state=state))
    assert track().output.startswith("run plain, killed: MLflow run ")
    metrics = the_run(mlflow_store).data.metrics
    assert metrics == {"train_loss": 0.5, "margin": 0.25, "images_per_s": 100.0}


def test_a_training_that_goes_on_is_left_to_itself(project: Path, mlflow_store: Path) -> None:
    write_note(RECORD)
    (path,) = notes()
    with FileLock(project / ".sdpipe" / "runs" / f"{RECORD.fingerprint}.lock"):
        done = track()
    assert (done.exit_code, notes()) == (0, [path])
    assert "its training goes on" in done.output


def test_an_older_end_does_not_undo_a_newer_one(project: Path, mlflow_store: Path) -> None:
    """A training was killed here, and finished on another machine."""
    write_note(replace(RECORD, started_ms=1))
    publish(replace(RECORD, status="FINISHED", tags={"stage": "evaluate"}))
    os.utime(notes()[0], (1000, 1000))
    assert track().exit_code == 0
    run = the_run(mlflow_store)
    assert (run.info.status, run.data.tags["stage"], notes()) == ("FINISHED", "evaluate", [])


def test_an_evaluation_before_the_note_is_sent_keeps_its_times(
    no_server: None, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is back when the finished run is evaluated; the note's turn undoes nothing then."""
    LiveTracker(RECORD).close("FINISHED")
    noted = read_note(notes()[0])
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    time.sleep(0.1)
    publish(replace(RECORD, status="FINISHED", tags={"stage": "evaluate"}))
    for _ in range(2):
        run = the_run(mlflow_store)
        assert (run.info.start_time, run.info.end_time) == (noted.started_ms, noted.ended_ms)
        assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "evaluate")
        track()
        assert not notes()


def test_a_clock_that_was_ahead_does_not_hide_the_end(
    mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at a time still to come, continued and finished: MLflow has that, and no note is left."""
    now_ms = tracking._now_ms
    monkeypatch.setattr(tracking, "_now_ms", lambda: now_ms() + 600_000)
    LiveTracker(RECORD).close("KILLED")
    monkeypatch.setattr(tracking, "_now_ms", now_ms)
    LiveTracker(RECORD).close("FINISHED", {"test_error": 0.5})
    run = the_run(mlflow_store)
    assert (run.info.status, run.data.metrics["test_error"], notes()) == ("FINISHED", 0.5, [])


@pytest.mark.parametrize(
    ("later", "ahead_ms", "status", "num_epochs", "ended_ms"),
    [
        (replace(RECORD, status="FINISHED"), HOUR, "FINISHED", 2, 0),
        (replace(RECORD, status="KILLED", epochs=FURTHER), HOUR, "KILLED", 3, HOUR),
        (replace(RECORD, status="FAILED", epochs=FURTHER), HOUR, "FAILED", 3, HOUR),
        (replace(RECORD, status="FAILED"), HOUR, "KILLED", 2, HOUR),
        (replace(RECORD, status="KILLED", epochs=FURTHER), -HOUR, "KILLED", 3, 0),
    ],
)
def test_a_later_end_is_known_by_more_than_its_time(
    mlflow_store: Path, later: RunRecord, ahead_ms: int, status: str, num_epochs: int, ended_ms: int
) -> None:
    """The clock was an hour ahead when the run was killed; what has trained no further may be older.

    Of two ends the later time stands, but that of a finished run is its own.
    """
    now_ms = tracking._now_ms()
    publish(replace(RECORD, status="KILLED", ended_ms=now_ms + ahead_ms))
    write_note(replace(later, started_ms=now_ms - 1, ended_ms=now_ms))
    assert track().exit_code == 0
    run = the_run(mlflow_store)
    history = MlflowClient(f"sqlite:///{mlflow_store}").get_metric_history(run.info.run_id, "train_loss")
    assert (run.info.status, len(history), notes()) == (status, num_epochs, [])
    assert run.info.end_time - now_ms == ended_ms


@pytest.mark.parametrize("num_epochs", [0, 2])
def test_no_older_end_undoes_a_finished_run(mlflow_store: Path, num_epochs: int) -> None:
    """Nor where MLflow has it without its epochs, as behind the registration in an empty store."""
    publish(replace(RECORD, status="FINISHED", epochs=RECORD.epochs[:num_epochs]))
    write_note(replace(RECORD, status="KILLED", started_ms=1, ended_ms=2))
    assert (track().exit_code, the_run(mlflow_store).info.status) == (0, "FINISHED")


def test_who_said_how_it_ended_has_said_it(mlflow_store: Path, no_server: None) -> None:
    """As where Ctrl-C comes while a finished training waits for MLflow."""
    tracker = LiveTracker(RECORD)
    tracker.close("FINISHED")
    tracker.close("KILLED")
    assert read_note(notes()[0]).status == "FINISHED"


def test_a_note_that_has_gone_is_nobodys_fault(project: Path) -> None:
    done = track(str(project / ".sdpipe" / "runs" / "0123.plain.json"))
    assert (done.exit_code, "sends it itself" in done.output) == (0, True)


def test_a_damaged_note_is_named_and_the_others_are_sent(project: Path, mlflow_store: Path) -> None:
    write_note(replace(RECORD, status="FAILED"))
    damaged = project / ".sdpipe" / "runs" / "0.json"
    damaged.write_text("{")
    done = track()
    assert done.exit_code == 1
    assert f"error: {damaged}: cannot be read: " in done.output
    assert the_run(mlflow_store).info.status == "FAILED"
    assert notes() == [damaged]


@pytest.mark.parametrize("name", ["nosuch.json", "no/such.json", "models/plain/train.json"])
def test_what_is_no_note_is_refused_and_gets_no_lock(project: Path, name: str) -> None:
    (project / "models" / "plain").mkdir(parents=True)
    (project / "models" / "plain" / "train.json").write_text("{}")
    before = sorted(project.rglob("*"))
    done = track(str(project / name))
    assert (done.exit_code, sorted(project.rglob("*"))) == (1, before)
    assert f"{name}: expected a folder, or a note in .sdpipe/runs" in done.output


def test_notes_behind_a_link_are_notes(project: Path, mlflow_store: Path) -> None:
    """Unfinished work may stand on another disk."""
    (project / "elsewhere").mkdir()
    (project / ".sdpipe").mkdir()
    (project / ".sdpipe" / "runs").symlink_to(project / "elsewhere")
    write_note(replace(RECORD, status="FAILED"))
    assert track().output.startswith("run plain, failed: MLflow run ")
    assert not notes()


def test_a_note_of_an_unknown_status_is_named(project: Path, mlflow_store: Path) -> None:
    write_note(RECORD)
    (path,) = notes()
    path.write_text(path.read_text().replace('"RUNNING"', '"WEIRD"'))
    assert f"error: {path}: cannot be read: status: expected 'RUNNING'" in track().output


def test_a_note_is_the_record(project: Path) -> None:
    write_note(replace(RECORD, summary={"test_error": 0.1}, started_ms=1, ended_ms=2))
    (path,) = notes()
    lists = {"epochs": list(RECORD.epochs), "artifacts": []}
    assert read_note(path) == replace(RECORD, summary={"test_error": 0.1}, started_ms=1, ended_ms=2, **lists)


def test_a_training_that_ends_before_its_rate_drops_says_so(
    dataset: DataSet, project: Path, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where somebody asks for fewer epochs alone; a drop behind the end is there to be continued to."""
    train_run("a", train_config(epochs=2, milestones=[1]), machine(), dataset, "code", project / "a")
    assert "learning rate" not in capsys.readouterr().out
    train_run("b", train_config(epochs=2, milestones=[1, 2, 9]), machine(), dataset, "code", project / "b")
    said = "run b: no drop of the learning rate after epochs 2, 9, since train.epochs is 2\n"
    assert said in capsys.readouterr().out

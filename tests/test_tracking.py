"""MLflow as a view of the files: complete, and rebuilt when lost."""

import errno
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import export_to, machine, train_config
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from test_evaluate import CONFIG

from sdpipe.data.store import DataSet
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_ensemble
from sdpipe.deploy.fold import fold_file
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.deploy.quantize import halve
from sdpipe.errors import DataError, ModelError, TrackingError
from sdpipe.files import read_json, write_json
from sdpipe.track import track
from sdpipe.training.records import record_from_files
from sdpipe.training.run_files import read_rows
from sdpipe.training.run_record import RunRecord
from sdpipe.training.session import train_run
from sdpipe.training.tracking import publish
from sdpipe.training.weights import load_weights

RECORD = RunRecord(
    name="plain",
    fingerprint="0123456789abcdef",
    status="RUNNING",
    params={"p_L": 0.5},
    tags={"stage": "train"},
    epochs=[{"train_loss": 2.0}, {"train_loss": 1.0}],
)


def runs(store: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("sdpipe")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def test_publishing_again_adds_only_what_is_missing(mlflow_store: Path) -> None:
    """One run by fingerprint; each epoch once; the status follows."""
    first = publish(RECORD)
    assert publish(RECORD) == first
    publish(replace(RECORD, epochs=[*RECORD.epochs, {"train_loss": 0.5}], status="FINISHED"))
    (run,) = runs(mlflow_store)
    assert run.info.status == "FINISHED"
    client = MlflowClient(f"sqlite:///{mlflow_store}")
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert publish(replace(RECORD, name="twin")) != first, "another run, though of the same fingerprint"
    (run,) = [run for run in runs(mlflow_store) if run.info.run_name == "plain"]
    assert run.data.params == {"p_L": "0.5"}


def test_a_killed_run_goes_on_and_a_finished_one_stays(mlflow_store: Path) -> None:
    """As where another clone begins the same training and is stopped: its end is none of the finished run."""
    client = MlflowClient(f"sqlite:///{mlflow_store}")
    now_ms = int(time.time() * 1000)
    for status, then in (
        ("RUNNING", "RUNNING"),
        ("KILLED", "KILLED"),
        ("RUNNING", "RUNNING"),
        ("FINISHED", "FINISHED"),
        ("RUNNING", "FINISHED"),
        ("KILLED", "FINISHED"),
        ("FAILED", "FINISHED"),
    ):
        now_ms += 1000
        ended_ms = None if status == "RUNNING" else now_ms
        run_id = publish(replace(RECORD, status=status, ended_ms=ended_ms))
        assert client.get_run(run_id).info.status == then
    assert client.get_run(run_id).info.end_time == now_ms - 3000


def test_a_run_may_have_any_name_that_a_folder_may(mlflow_store: Path) -> None:
    record = replace(RECORD, name='it\'s a "é" run')
    assert publish(record) == publish(record)
    assert [run.info.run_name for run in runs(mlflow_store)] == [record.name]


def test_what_was_done_again_with_other_numbers_is_sent_again(mlflow_store: Path) -> None:
    """As by another number of processes: the files are the truth, and the curve is theirs."""
    epochs = [{"train_loss": loss, "images_per_s": 10.0} for loss in (3.0, 2.0, 1.0)]
    run_id = publish(replace(RECORD, epochs=epochs))
    epochs = [{"train_loss": loss, "images_per_s": 20.0} for loss in (3.0, 2.5, 1.0, 0.5)]
    for _ in range(2):
        assert publish(replace(RECORD, epochs=epochs)) == run_id
        client = MlflowClient(f"sqlite:///{mlflow_store}")
        losses = client.get_metric_history(run_id, "train_loss")
        assert sorted((each.step, each.value) for each in losses) == [
            (1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0), (3, 1.0), (4, 0.5),
        ]  # fmt: skip
        latest = {each.step: each.value for each in sorted(losses, key=lambda each: each.timestamp)}
        assert latest == {1: 3.0, 2: 2.5, 3: 1.0, 4: 0.5}
        assert client.get_run(run_id).data.metrics["train_loss"] == 0.5


@pytest.fixture
def finished(project: Path, dataset: DataSet, mlflow_store: Path) -> Path:
    """models/plain/ after train, fold, export and evaluate."""
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments], check=True)
    folder = project / "models" / "plain"
    train_run("plain", train_config(epochs=2, milestones=[]), machine(), dataset, "code", folder)
    fold_file(folder / "weights.safetensors", folder / "folded.safetensors")
    weights = load_weights(folder / "weights.safetensors")
    export_to(folder / "model.onnx", weights)
    export_ensemble(weights, folder / "ensemble.onnx", ExportConfig(opset=20), temperature=1.0)
    write_json(folder / "calibration.json", {"temperature": 1.0})
    halve(folder / "model.onnx", folder / "model.fp16.onnx")
    config = CONFIG.model_copy(update={"batch_sizes": (64,), "max_relative_logit_diff": 1e-5})
    evaluate_run(folder, dataset, read_rows(folder / "history.csv"), config, num_bins=5)
    return folder


def begin_and_fail(store: LocalArtifactRepository, folder: str, *_rest: object) -> None:
    """As on a full disk: of a model's files the first is there."""
    Path(store.artifact_dir).mkdir(parents=True)
    shutil.copy(Path(folder) / "MLmodel", store.artifact_dir)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_finished_run_is_complete_and_is_rebuilt_when_lost(
    finished: Path, mlflow_store: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Params, tags, per-epoch metrics, figures and model; the same from the files alone in an empty store.

    The run keeps the times of its training; where nothing has them, timing.json says how long it took and,
    by the time it was written, when it ended.
    """
    (trained,) = runs(mlflow_store)
    run_id = track(finished)
    (run,) = runs(mlflow_store)
    assert (run.info.start_time, run.info.end_time) == (trained.info.start_time, trained.info.end_time)
    before = describe(mlflow_store)
    assert before["params"]["p_L"] == "0.5"
    assert before["params"]["warmup.epochs"] == "0"
    assert {"git_commit", "git_dirty", "stage", "fingerprint", "data_digest", "model_sha256"} <= before[
        "tags"
    ]
    assert before["status"] == "FINISHED"
    assert before["steps"] == {
        name: [1, 2]
        for name in (
            "train_loss", "validation_error", "validation_loss", "learning_rate", "blocks_active",
            "images_per_s", "mean_abs_grad",
        )
    }  # fmt: skip
    assert {"confusion.png", "training.png", "metrics.json", "mistakes.png"} <= before["artifacts"]
    metrics, latency = (read_json(finished / name) for name in ("metrics.json", "latency.json"))
    assert before["metrics"]["fp16.test_error"] == metrics["variants"]["fp16"]["test_error"]
    assert before["metrics"]["fp16.batch_1_ms"] == latency["batch_1"]["fp16"]["median_ms"]
    assert before["models"] == 1
    assert track(finished) == run_id
    assert describe(mlflow_store) == before, "a second time adds nothing"
    shutil.rmtree(mlflow_store.parent / "mlartifacts")
    assert track(finished) == run_id
    lost_and_again = before["models"] + 1
    assert describe(mlflow_store) == before | {"models": lost_and_again}, "what the tags say may be gone"
    shutil.rmtree(mlflow_store.parent / "mlartifacts")
    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "log_artifacts", begin_and_fail)
        with pytest.raises(TrackingError, match="No space left"):
            track(finished)
    track(finished)
    assert describe(mlflow_store) == before | {"models": lost_and_again + 2}, "what was cut short is not it"
    mlflow_store.write_bytes(empty_store.read_bytes())
    os.utime(finished / "timing.json", (1000, 1000))
    assert track(finished) != run_id
    assert describe(mlflow_store) == before
    (run,) = runs(mlflow_store)
    train_ms = int(read_json(finished / "timing.json")["train_s"] * 1000)
    assert (run.info.start_time, run.info.end_time) == (1_000_000 - train_ms, 1_000_000)


DAMAGES = [  # file, what is replaced by what, and what is said
    ("train.json", '"best_epoch": ', '"best_epoch": "x", "b": ', r"train\.json: best_epoch: expected"),
    ("train.json", '"test_error": ', '"test_error": NaN, "b": ', r"train\.json: test_error: expected"),
    ("timing.json", '"git_commit"', '"x"', r"timing\.json: expected an entry git_commit"),
    ("timing.csv", "images_per_s", "x", "with images_per_s"),
    ("history.csv", "\n2,", "\n2.5,", "of the same epochs"),
    ("latency.json", '"median_ms": ', '"median_ms": "x", "b": ', r"latency\.json: .* expected a finite"),
    ("metrics.json", '"variants": {', '"variants": [], "b": {', None),
]


def test_damaged_files_of_a_run_are_named(finished: Path, mlflow_store: Path) -> None:
    for name, old, new, says in DAMAGES:
        text = (finished / name).read_text()
        assert old in text
        (finished / name).write_text(text.replace(old, new))
        if says is None:
            track(finished)
        else:
            with pytest.raises(DataError, match=says):
                track(finished)
        (finished / name).write_text(text)
    model = finished / "model.onnx"
    model.write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.onnx: damaged, or another file than metrics.json is about"):
        track(finished)
    model.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx: cannot be read: No such file"):
        track(finished)


def describe(store: Path) -> dict[str, Any]:
    (run,) = runs(store)
    client = MlflowClient(f"sqlite:///{store}")
    per_epoch = {
        name: [metric.step for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return {
        "params": run.data.params,
        "tags": set(run.data.tags),
        "status": run.info.status,
        "metrics": dict(run.data.metrics),
        "steps": {name: steps for name, steps in per_epoch.items() if steps != [0]},
        "artifacts": {artifact.path for artifact in client.list_artifacts(run.info.run_id)},
        "models": len(client.search_logged_models([run.info.experiment_id])),
    }


@pytest.mark.slow
def test_an_evaluation_of_older_weights_is_not_published(finished: Path) -> None:
    metrics = finished / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"fingerprint": "', '"fingerprint": "x'))
    record = record_from_files(finished)
    assert (record.model, record.artifacts, record.tags["stage"]) == (None, [], "train")


@pytest.mark.slow
@pytest.mark.parametrize("roots", [(".", "."), ("one", "other")])
def test_two_processes_may_make_the_store_at_once(project: Path, roots: tuple[str, str]) -> None:
    """Of one project or of two; without the lock both crash, or the second database replaces the first."""
    code = (
        "from sdpipe.training.run_record import RunRecord\n"
        "from sdpipe.training.tracking import publish\n"
        "import sys\n"
        "publish(RunRecord(name='x', fingerprint=sys.argv[1], status='FINISHED', params={}, tags={}))"
    )
    processes = []
    for root, name in zip(roots, "ab", strict=True):
        (project / root).mkdir(exist_ok=True)
        env = os.environ | {"DVC_ROOT": root, "MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
        command = [sys.executable, "-c", code, name]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    assert len(runs(project / "mlflow.db")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds", [2.0, *(pytest.param(each, marks=pytest.mark.long) for each in (1.0, 3.0))]
)
def test_a_store_whose_making_was_killed_is_made_again(project: Path, seconds: float) -> None:
    """MLflow cannot go on with half of its tables; they are made beside and renamed."""
    code = (
        "from sdpipe.training.run_record import RunRecord\n"
        "from sdpipe.training.tracking import publish\n"
        "import mlflow, sys\n"
        "print('ready', flush=True)\n"
        "publish(RunRecord(name='x', fingerprint='a', status='FINISHED', params={}, tags={}))"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    time.sleep(seconds)
    first.kill()
    first.communicate()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert len(runs(project / "mlflow.db")) == 1

"""The loop: the paper's update, the same bytes each time, and nothing lost when the process is killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_dataset, train_config
from filelock import FileLock

from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import BusyError, DataError, DeviceError, TrainingError
from sdpipe.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.loop import Trainer, TrainResult, train
from sdpipe.training.progress import EpochRecord, Progress
from sdpipe.training.session import train_run

CPU = choose_compute("cpu", "fp32")


def run(config: TrainConfig, dataset: DataSet, folder: Path, **keywords: object) -> TrainResult:
    return train(config, dataset, CPU, folder, keywords.get("on_epoch", lambda _progress: None))  # type: ignore[arg-type]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns(dataset: DataSet, tmp_path: Path) -> None:
    """Three classes of stripes: chance is an error of 2/3."""
    result = run(train_config(epochs=12, milestones=[9], p_L=0.8), dataset, tmp_path)
    assert result.test_error <= 0.15


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(dataset: DataSet, tmp_path: Path) -> None:
    first, second, other = (
        run(train_config(seed=seed), dataset, tmp_path / str(at)) for at, seed in enumerate((0, 0, 1))
    )
    assert same(first.state, second.state)
    assert first.progress.history == second.progress.history
    assert not same(first.state, other.state)


class KilledError(Exception):
    """Stands for the process's end."""


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_run_continues_and_ends_the_same(
    dataset: DataSet, tmp_path: Path, killed_after: int
) -> None:
    """Weights, history and test error are those of the run that was never stopped."""
    config = train_config(epochs=4, milestones=[2])

    def kill(progress: Progress) -> None:
        if len(progress.history) == killed_after:
            raise KilledError

    whole = run(config, dataset, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(config, dataset, tmp_path / "killed", on_epoch=kill)
    continued = run(config, dataset, tmp_path / "killed")
    assert same(whole.state, continued.state)
    assert whole.progress.history == continued.progress.history
    assert whole.test_error == continued.test_error


def trainer_with_inactive_block(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, **overrides: object
) -> Trainer:
    """A training in which block 4 (of 9, from 0) is never active and the others always are."""
    trainer = Trainer(train_config(**overrides), dataset, CPU)
    active = [at != 4 for at in range(9)]
    monkeypatch.setattr(trainer.draws, "active_blocks", lambda *_arguments: active)
    return trainer


class _NoBar:
    def update(self) -> None:
        """Draw nothing."""


def test_an_inactive_block_is_still_decayed(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient 0, not None. By hand, with Nesterov momentum m, decay d, rate r, all steps g = d w:

    v = m v + g;  w = w - r (g + m v). One epoch has 96 // 16 = 6 steps.
    """
    trainer = trainer_with_inactive_block(dataset, monkeypatch, weight_decay=0.1)
    weight = trainer.network.get_parameter("blocks.4.branch.conv1.weight")
    expected = weight.detach().double().clone()
    velocity = torch.zeros_like(expected)
    assert trainer.steps_per_epoch == 6
    for _ in range(6):
        gradient = 0.1 * expected
        velocity = 0.9 * velocity + gradient
        expected = expected - 0.1 * (gradient + 0.9 * velocity)
    trainer.run_epoch(0, _NoBar())  # type: ignore[arg-type]
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_an_inactive_block_is_carried_by_its_momentum(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without decay and gradient: v_k = m^k v_0 and w falls by r m v_k in each step k = 1..6."""
    trainer = trainer_with_inactive_block(dataset, monkeypatch, weight_decay=0.0)
    weight = trainer.network.get_parameter("blocks.4.branch.conv2.weight")
    before = weight.detach().clone()
    trainer.optimizer.state[weight]["momentum_buffer"].fill_(1.0)
    trainer.run_epoch(0, _NoBar())  # type: ignore[arg-type]
    fall = sum(0.1 * 0.9 * 0.9**k for k in range(1, 7))
    torch.testing.assert_close(weight.detach(), before - fall, rtol=1e-5, atol=1e-6)


def test_batchnorm_of_an_inactive_block_keeps_its_statistics(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with_inactive_block(dataset, monkeypatch)
    trainer.run_epoch(0, _NoBar())  # type: ignore[arg-type]
    assert not trainer.network.get_buffer("blocks.4.branch.bn1.running_mean").any()
    assert trainer.network.get_buffer("blocks.5.branch.bn1.running_mean").any()


def test_history_records_what_was_drawn(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with_inactive_block(dataset, monkeypatch)
    trainer.run_epoch(0, _NoBar())  # type: ignore[arg-type]
    (record,) = trainer.progress.history
    assert record.blocks_active == 8
    assert record.learning_rate == 0.1
    assert record.mean_abs_grad > 0


def test_constant_depth_uses_every_block(dataset: DataSet, tmp_path: Path) -> None:
    result = run(train_config(p_L=1.0, epochs=1, milestones=[]), dataset, tmp_path)
    assert result.progress.history[0].blocks_active == 9


def record(epoch: int, error: float) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        learning_rate=0.1,
        train_loss=1.0,
        validation_loss=1.0,
        validation_error=error,
        blocks_active=9.0,
        mean_abs_grad=0.1,
    )


def test_the_epoch_of_lowest_validation_error_is_kept() -> None:
    """Of equal ones the last; never the best test error, which is not even measured before the end."""
    errors = [0.5, 0.2, 0.3, 0.2, 0.4]
    progress = Progress(history=[record(at, error) for at, error in enumerate(errors, start=1)])
    assert progress.best.epoch == 4


def test_the_reported_test_error_is_that_of_the_kept_epoch(dataset: DataSet, tmp_path: Path) -> None:
    """Measured again from the returned weights, one image at a time."""
    result = run(train_config(epochs=4), dataset, tmp_path)
    trainer = Trainer(train_config(), dataset, CPU)
    trainer.network.load_state_dict(result.state)
    trainer.network.eval()
    wrong = 0
    with torch.no_grad():
        for image, label in zip(dataset.test_images_NHWC, dataset.test_labels_N, strict=True):
            pixels = torch.from_numpy(np.array(image[None]))
            wrong += int(trainer.network(trainer.normalise(pixels).permute(0, 3, 1, 2)).argmax()) != label
    assert result.test_error == wrong / len(dataset.test_labels_N)


def test_a_loss_that_is_not_finite_ends_the_training(dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="epoch 1: (train|validation)_loss is (nan|inf) at learning rate"):
        run(train_config(learning_rate=1e30, weight_decay=1.0), dataset, tmp_path)


def test_a_gradient_that_overflows_in_fp16_is_not_noted(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler skips such a step by design; the mean over the others stays finite."""
    fp16 = Compute(device=torch.device("cpu"), precision="fp16", reason="to try the scaler")
    trainer = Trainer(train_config(), dataset, fp16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    trainer.run_epoch(0, _NoBar())  # type: ignore[arg-type]
    assert np.isfinite(trainer.progress.history[0].mean_abs_grad)


def test_fewer_images_than_a_batch_are_refused(dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.batch_size: 500 images asked for, 96"):
        run(train_config(batch_size=500), dataset, tmp_path)


def test_cuda_and_precision_are_not_silently_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        choose_compute("cuda", "auto")
    with pytest.raises(DeviceError, match="fp16"):
        choose_compute("cpu", "fp16")
    monkeypatch.setattr("sdpipe.training.compute._cpu_has_bf16", lambda: False)
    assert choose_compute("auto", "auto").precision == "fp32"
    monkeypatch.setattr("sdpipe.training.compute._cpu_has_bf16", lambda: True)
    assert choose_compute("auto", "auto").precision == "bf16"


# ---------------------------------------------------------------- checkpoints


def checkpoint(num_epochs: int) -> Checkpoint:
    return Checkpoint(
        num_epochs=num_epochs,
        tensors={"network.x": torch.full((3,), float(num_epochs))},
        progress={"history": []},
    )


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for num_epochs in (1, 2, 3, 12):
        save_checkpoint(tmp_path, checkpoint(num_epochs))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-0003.json",
        "epoch-0003.safetensors",
        "epoch-0012.json",
        "epoch-0012.safetensors",
    ]
    found, damaged = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.num_epochs, damaged) == (12, [])


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for num_epochs in (9_999, 10_000):
        save_checkpoint(tmp_path, checkpoint(num_epochs))
    found, _ = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert found.num_epochs == 10_000


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "no tensors", "no json", "broken json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    for num_epochs in (1, 2):
        save_checkpoint(tmp_path, checkpoint(num_epochs))
    tensors, manifest = tmp_path / "epoch-0002.safetensors", tmp_path / "epoch-0002.json"
    if damage == "flipped bit":
        raw = bytearray(tensors.read_bytes())
        raw[-1] ^= 1
        tensors.write_bytes(raw)
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no json":  # as if killed between the two files
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    found, damaged = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert found.num_epochs == 1
    assert len(damaged) == (damage != "no json")
    assert all("epoch-0002" in sentence for sentence in damaged)


# ---------------------------------------------------------------- the process


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}, {root!r}]
from conftest import train_config
from sdpipe.data.store import open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.training.session import train_run
with errors_on_one_line():
    config = train_config(epochs={epochs}, milestones=[])
    train_run("plain", config, open_dataset(Path("data")), "code", Path("out"))
"""


def start(project: Path, epochs: int) -> "subprocess.Popen[str]":
    script = SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT), epochs=epochs)
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(project: Path, process: "subprocess.Popen[str]") -> None:
    while not list(project.glob(".sdpipe/runs/*/epoch-*.json")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_is_continued_and_leaves_the_same_files(
    project: Path, mlflow_store: Path, number: signal.Signals
) -> None:
    """Terminated in mid run, started again: the same weights and history, one MLflow run, FINISHED."""
    make_dataset(project / "data")
    epochs = 30
    process = start(project, epochs)
    wait_for_checkpoint(project, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert not (project / "out").exists()
    process = start(project, epochs)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "continuing after epoch" in out
    killed = {name: (project / "out" / name).read_bytes() for name in ("weights.safetensors", "history.csv")}

    whole = train_config(epochs=epochs, milestones=[])
    train_run("plain", whole, open_dataset(project / "data"), "code", project / "out")
    assert {name: (project / "out" / name).read_bytes() for name in killed} == killed
    assert not list(project.glob(".sdpipe/runs/*/*")), "no checkpoint is left of a finished run"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{mlflow_store}")
    experiment = client.get_experiment_by_name("sdpipe")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    steps = [metric.step for metric in client.get_metric_history(logged.info.run_id, "validation_error")]
    assert sorted(steps) == list(range(1, epochs + 1))


def test_a_second_process_on_the_same_run_is_refused(
    project: Path, dataset: DataSet, mlflow_store: Path
) -> None:
    config = train_config(epochs=1, milestones=[])
    train_run("plain", config, dataset, "code", project / "out")
    (name,) = {json.loads((project / "out" / "train.json").read_text())["fingerprint"]}
    with FileLock(project / ".sdpipe" / "runs" / f"{name}.lock"), pytest.raises(BusyError, match="run plain"):
        train_run("plain", config, dataset, "code", project / "out")

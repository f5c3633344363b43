"""The loop: the paper's update, the same bytes each time, from any step on."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, train_alone, train_config
from picture_files import AUGMENTED, make_pictures

from sdpipe.data.store import DataSet
from sdpipe.errors import ConfigError, DataError, DeviceError, TrainingError
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.config import CheckpointConfig, TrainConfig
from sdpipe.training.finished import Lineage
from sdpipe.training.guard import FP16_STREAK, Guard
from sdpipe.training.interruption import Interruption
from sdpipe.training.loop import Saver
from sdpipe.training.progress import EpochRecord, Progress, TrainResult
from sdpipe.training.step import PartDraws
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World, joined_world

ALONE = World(0, 1, 0)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns(dataset: DataSet, tmp_path: Path) -> None:
    """Three classes of stripes: chance is an error of 2/3."""
    result = train_alone(train_config(epochs=12, milestones=[9], p_L=0.8), dataset, tmp_path)
    assert result.test_error <= 0.15


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(dataset: DataSet, tmp_path: Path) -> None:
    first, second, other = (
        train_alone(train_config(seed=seed), dataset, tmp_path / str(at)) for at, seed in enumerate((0, 0, 1))
    )
    assert same(first.state, second.state)
    assert first.progress.history == second.progress.history
    assert not same(first.state, other.state)


class StopAfter(Interruption):
    """As if SIGTERM came during the n-th step: the loop asks once after each."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(lambda: None)
        self.left = num_steps

    @property
    def requested(self) -> bool:
        """Asked once a step and once a batch of validation images."""
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("overrides", [{"draw": "sample"}, {"dropout": 0.2}, {"skip": "C"}], ids=str)
def test_it_learns_and_continues_in_other_ways(
    dataset: DataSet, tmp_path: Path, overrides: dict[str, object]
) -> None:
    """Drawn for each image, with dropout, with projections: to the bit after a stop within an epoch."""
    config = train_config(micro_batches=2, epochs=6, milestones=[4], **overrides)
    whole = train_alone(config, dataset, tmp_path / "whole")
    with pytest.raises(SystemExit):
        train_alone(config, dataset, tmp_path / "stopped", interruption=StopAfter(9))
    assert same(whole.state, train_alone(config, dataset, tmp_path / "stopped").state)
    assert whole.test_error <= 0.5
    assert whole.progress.history[-1].train_loss < whole.progress.history[0].train_loss


@pytest.mark.parametrize("asked", range(1, 21))
def test_a_run_stopped_at_any_step_continues_and_ends_the_same(
    dataset: DataSet, tmp_path: Path, asked: int
) -> None:
    """3 epochs of 6 steps and a validation: weights, history and test error to the bit.

    Two micro-batches and a scaler's absence are the harder case: BatchNorm moves twice a step.
    """
    config = train_config(micro_batches=2)
    whole = train_alone(config, dataset, tmp_path / "whole")
    with pytest.raises(SystemExit):
        train_alone(config, dataset, tmp_path / "stopped", interruption=StopAfter(asked))
    continued = train_alone(config, dataset, tmp_path / "stopped")
    assert same(whole.state, continued.state)
    assert whole.progress.history == continued.progress.history
    assert whole.test_error == continued.test_error


def keep_and_extend(config: TrainConfig, dataset: DataSet, folder: Path) -> tuple[TrainResult, list[str]]:
    """Finish what is in `folder`, keep its end as a session does, and go on from there with `config`."""
    train_alone(train_config(milestones=[]), dataset, folder / "run")
    weights_path = folder / "weights.safetensors"
    weights_path.touch()
    lineage = Lineage(folder / "finished" / "lineage")
    lineage.keep(CheckpointFolder(folder / "run", "0123456789abcdef"), weights_path)
    start, told = lineage.find_start("another", config, None)
    if start is not None:
        CheckpointFolder(folder / "longer", "0123456789abcdef").save(start)
    return train_alone(config, dataset, folder / "longer"), told


# Every one of the 18 steps and 3 validations; the fast ones are about the ends of epochs.
@pytest.mark.parametrize(
    "asked",
    [pytest.param(at, marks=() if at in (7, 20, 21) else pytest.mark.slow) for at in range(1, 22)],
)
def test_a_run_that_was_stopped_anywhere_can_be_extended(
    dataset: DataSet, tmp_path: Path, asked: int
) -> None:
    """With a milestone in the new epochs: weights and history are those of a training without a stop."""
    config = train_config(epochs=5, milestones=[3, 4])
    whole = train_alone(config, dataset, tmp_path / "whole")
    with pytest.raises(SystemExit):
        train_alone(train_config(milestones=[]), dataset, tmp_path / "run", interruption=StopAfter(asked))
    extended, (told,) = keep_and_extend(config, dataset, tmp_path)
    assert told == "extending the finished training 0123456789abcdef of 3 epochs"
    assert extended.progress.history == whole.progress.history
    assert same(extended.state, whole.state)


def test_a_run_that_was_stopped_in_its_last_validation_is_refused_another_rate(
    dataset: DataSet, tmp_path: Path
) -> None:
    """Its epoch 3 was trained at 0.1; a milestone behind epoch 2 asks for 0.01 there."""
    with pytest.raises(SystemExit):
        train_alone(train_config(milestones=[]), dataset, tmp_path / "run", interruption=StopAfter(21))
    config = train_config(epochs=5, milestones=[2])
    extended, (told,) = keep_and_extend(config, dataset, tmp_path)
    assert "cannot be extended: its learning rate in epoch 3 was 0.1, params.yaml asks for 0.01" in told
    whole = train_alone(config, dataset, tmp_path / "whole")
    assert extended.progress.history == whole.progress.history
    assert same(extended.state, whole.state)


def test_a_state_within_an_epoch_is_no_end_to_extend(dataset: DataSet, tmp_path: Path) -> None:
    """The rate of its last steps is not known. Such a state is never kept; here it is put there."""
    run = CheckpointFolder(tmp_path / "run", "0123456789abcdef")
    with pytest.raises(SystemExit):
        train_alone(train_config(milestones=[]), dataset, run.folder, interruption=StopAfter(16))
    (tmp_path / "weights").touch()
    lineage = Lineage(tmp_path / "finished" / "lineage")
    lineage.keep(run, tmp_path / "weights")
    start, (told,) = lineage.find_start("another", train_config(epochs=5, milestones=[]), None)
    assert start is None
    assert "cannot be extended: it ends within epoch 3" in told


def test_where_checkpoints_are_written_changes_nothing(dataset: DataSet, tmp_path: Path) -> None:
    often, seldom = (
        train_alone(train_config(), dataset, tmp_path / str(every), every_steps=every) for every in (1, 0)
    )
    assert same(often.state, seldom.state)
    assert often.progress.history == seldom.progress.history


def trainer_with_inactive_block(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch, **overrides: object
) -> Trainer:
    """A training in which block 4 (of 9, from 0) is never active and the others always are."""
    trainer = Trainer(train_config(**overrides), dataset, CPU, ALONE)
    active = [at != 4 for at in range(9)]
    monkeypatch.setattr(trainer.draws, "active_blocks", lambda *_arguments: active)
    return trainer


def run_epoch(trainer: Trainer) -> None:
    for _ in trainer.steps():
        pass
    trainer.validate()


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
    run_epoch(trainer)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_an_inactive_block_is_carried_by_its_momentum(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without decay and gradient: v_k = m^k v_0 and w falls by r m v_k in each step k = 1..6."""
    trainer = trainer_with_inactive_block(dataset, monkeypatch, weight_decay=0.0)
    weight = trainer.network.get_parameter("blocks.4.branch.conv2.weight")
    before = weight.detach().clone()
    trainer.step.optimizer.state[weight]["momentum_buffer"].fill_(1.0)
    run_epoch(trainer)
    fall = sum(0.1 * 0.9 * 0.9**k for k in range(1, 7))
    torch.testing.assert_close(weight.detach(), before - fall, rtol=1e-5, atol=1e-6)


def test_batchnorm_of_an_inactive_block_keeps_its_statistics(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with_inactive_block(dataset, monkeypatch)
    run_epoch(trainer)
    assert not trainer.network.get_buffer("blocks.4.branch.bn1.running_mean").any()
    assert trainer.network.get_buffer("blocks.5.branch.bn1.running_mean").any()


def test_history_records_what_was_drawn(dataset: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with_inactive_block(dataset, monkeypatch)
    run_epoch(trainer)
    (record,) = trainer.progress.history
    assert record.blocks_active == 8
    assert record.learning_rate == 0.1
    assert record.mean_abs_grad > 0


def test_constant_depth_uses_every_block(dataset: DataSet, tmp_path: Path) -> None:
    result = train_alone(train_config(p_L=1.0, epochs=1, milestones=[]), dataset, tmp_path)
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
    result = train_alone(train_config(epochs=4), dataset, tmp_path)
    trainer = Trainer(train_config(), dataset, CPU, ALONE)
    trainer.network.load_state_dict(result.state)
    trainer.network.eval()
    wrong = 0
    with torch.no_grad():
        for image, label in zip(dataset.test_images_NHWC, dataset.test_labels_N, strict=True):
            pixels = torch.from_numpy(np.array(image[None]))
            wrong += int(trainer.network(trainer.normalise(pixels).permute(0, 3, 1, 2)).argmax()) != label
    assert result.test_error == wrong / len(dataset.test_labels_N)


def test_a_loss_that_is_not_finite_stops_before_the_update(dataset: DataSet, tmp_path: Path) -> None:
    """The message has the step, the rate and the images; the weights and the newest checkpoint are finite."""
    config = train_config(learning_rate=1e30, weight_decay=1.0)
    with pytest.raises(TrainingError) as caught:
        train_alone(config, dataset, tmp_path, every_steps=1)
    message = str(caught.value)
    assert "at learning rate 1e+30" in message
    checkpoint, damaged = CheckpointFolder(tmp_path, "0123456789abcdef").load_newest()
    assert checkpoint is not None
    assert damaged == []
    bad_step = checkpoint.num_steps
    assert f"epoch 1, step {bad_step + 1} of 6: loss" in message
    trainer = Trainer(config, dataset, CPU, ALONE)
    order = trainer.draws.order(0, 96)[bad_step * 16 : (bad_step + 1) * 16]
    assert f"images {trainer.train_indices[order].tolist()};" in message
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_update(dataset: DataSet, value: float) -> None:
    """One number in one gradient, while the loss is finite."""
    trainer = Trainer(train_config(p_L=1.0), dataset, CPU, ALONE)
    weight = trainer.network.get_parameter("blocks.3.branch.conv1.weight")

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoiled = gradient.clone()
        spoiled[0, 0, 1, 1] = value
        return spoiled

    steps = trainer.steps()
    next(steps)
    before = copy.deepcopy(list(trainer.network.parameters()))
    weight.register_hook(spoil)
    with pytest.raises(TrainingError, match=r"epoch 1, step 2 of 6: loss [\d.]+, gradient norm (nan|inf)"):
        next(steps)
    assert all(map(torch.equal, before, trainer.network.parameters()))
    with pytest.raises(TrainingError):
        trainer.checkpoint()


def test_the_guard_bears_with_fp16_for_a_while() -> None:
    """Overflowing gradients in a row are the scaler's work, until the scale cannot be the reason."""
    guard = Guard(torch.device("cpu"), FP16_STREAK)
    loss, finite, inf = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(float("inf"))
    for step in range(FP16_STREAK):
        guard.watch(step, loss, inf)
    guard.watch(FP16_STREAK, loss, finite)
    for step in range(FP16_STREAK):
        guard.watch(100 + step, loss, inf)
        assert guard.bad_step() is None
    guard.watch(200, loss, inf)
    guard.watch(201, loss, inf)
    assert guard.bad_step() == (200, 1.0, float("inf"))


def test_a_gradient_that_overflows_in_fp16_is_not_noted(
    dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler skips such a step by design; the mean over the others stays finite."""
    fp16 = Compute(device=torch.device("cpu"), precision="fp16", reason="to try the scaler")
    trainer = Trainer(train_config(), dataset, fp16, ALONE)
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    run_epoch(trainer)
    assert np.isfinite(trainer.progress.history[0].mean_abs_grad)


def test_the_scaler_goes_on_where_it_was(dataset: DataSet, tmp_path: Path) -> None:
    """fp16 from a scale of 2^40, which overflows for many steps: stopped in between, the same bytes."""
    fp16 = Compute(device=torch.device("cpu"), precision="fp16", reason="to try the scaler")
    states = []
    for stop_at in (0, 8):
        trainer = Trainer(train_config(epochs=3), dataset, fp16, ALONE)
        trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3)
        for _ in range(3):
            for _ in trainer.steps():
                if trainer.num_steps == stop_at:
                    saved = trainer.checkpoint()
                    trainer = Trainer(train_config(epochs=3), dataset, fp16, ALONE)
                    trainer.step.scaler = torch.amp.GradScaler("cpu", growth_interval=3)
                    trainer.restore(saved)
                    break
            if trainer.sums.num_steps < 6:
                for _ in trainer.steps():
                    pass
            trainer.validate()
        states.append({name: tensor.clone() for name, tensor in trainer.network.state_dict().items()})
    assert same(*states)


def test_a_state_that_is_not_finite_is_not_saved(dataset: DataSet) -> None:
    """Running statistics may overflow while loss and gradients are finite."""
    trainer = Trainer(train_config(), dataset, CPU, ALONE)
    next(trainer.steps())
    trainer.network.get_buffer("blocks.2.branch.bn1.running_var").fill_(float("inf"))
    with pytest.raises(
        TrainingError, match=r"after step 1: network.blocks.2.branch.bn1.running_var and 0 other"
    ):
        trainer.checkpoint()


def test_a_validation_loss_that_is_not_finite_ends_the_training(dataset: DataSet) -> None:
    trainer = Trainer(train_config(), dataset, CPU, ALONE)
    for _ in trainer.steps():
        pass
    trainer.network.get_buffer("stem.bn.running_mean").fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"epoch 1: the validation loss is nan at learning rate 0\.1"):
        trainer.validate()
    assert trainer.progress.history == []


def test_fewer_images_than_a_batch_are_refused(dataset: DataSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.batch_size: 500 images asked for, 96"):
        train_alone(train_config(batch_size=500), dataset, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's own, at reading .grad of its copies
def test_compiled_blocks_compute_the_same(dataset: DataSet, tmp_path: Path) -> None:
    """To rounding: the compiler may add in another order."""
    plain, compiled = (
        train_alone(
            train_config(depth=8, epochs=2, milestones=[], compile=compile_it),
            dataset,
            tmp_path / str(compile_it),
        )
        for compile_it in (False, True)
    )
    for ours, theirs in zip(plain.progress.history, compiled.progress.history, strict=True):
        assert theirs.train_loss == pytest.approx(ours.train_loss, rel=1e-4)


# ---------------------------------------------------------------- micro-batches


def batch_of(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return next(iter(trainer.batches.epoch(0, range(1), trainer.step.parts)))


def test_the_parts_of_a_batch_are_its_images(dataset: DataSet) -> None:
    whole = batch_of(Trainer(train_config(), dataset, CPU, ALONE))
    parts = batch_of(Trainer(train_config(micro_batches=5), dataset, CPU, ALONE))
    assert [len(labels) for _, labels in parts] == [3, 3, 3, 3, 4]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole[0][0])


def test_accumulated_gradients_are_those_of_the_mean_loss(dataset: DataSet) -> None:
    """Against autograd in float64, of the mean loss over all images, each part normalised by itself.

    What differs from one large batch is BatchNorm's normalisation alone.
    """
    trainer = Trainer(train_config(micro_batches=3), dataset, CPU, ALONE)
    reference = copy.deepcopy(trainer.network).double().train()
    active = trainer.draws.active_blocks(0, 0, reference.config.survival_probs)
    parts = batch_of(trainer)
    losses = [
        F.cross_entropy(reference(images.double(), active), labels, reduction="sum")
        for images, labels in parts
    ]
    reference.zero_grad()
    mean_loss = torch.stack(losses).sum() / 16
    mean_loss.backward()
    loss = trainer.step.run(0, parts, lambda *_part: PartDraws(active=active), 0.0)
    assert loss is not None
    torch.testing.assert_close(loss.double(), mean_loss.detach(), rtol=1e-5, atol=1e-6)
    for own, theirs in zip(trainer.network.parameters(), reference.parameters(), strict=True):
        assert own.grad is not None
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        scale = expected.abs().max().item() + 1e-6
        torch.testing.assert_close(own.grad.double() / scale, expected / scale, rtol=0, atol=2e-4)


def test_running_statistics_are_the_mean_over_the_parts(dataset: DataSet) -> None:
    """(1 - 0.1) old + 0.1 mean(batch means), worked out from the stem's outputs in float64."""
    trainer = Trainer(train_config(micro_batches=4), dataset, CPU, ALONE)
    stem = trainer.network.stem
    stem.bn.running_mean.fill_(3.0)
    parts = batch_of(trainer)
    with torch.no_grad():
        outputs = [stem.conv.double()(images.double()) for images, _ in parts]
    stem.conv.float()
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    variance = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    trainer.step.run(0, parts, lambda *_part: PartDraws(active=[True] * 9), 0.0)
    torch.testing.assert_close(stem.bn.running_mean.double(), 0.9 * 3.0 + 0.1 * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stem.bn.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-5)


def test_parts_of_one_image_are_refused(dataset: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: 16 images are too few for 12 parts .*12 processes"):
        Trainer(train_config(), dataset, CPU, World(0, 12, 0))


# ---------------------------------------------------------------- when a checkpoint is due


def test_a_checkpoint_is_due_by_step_and_by_time_and_never_costs_more_than_2_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A save of 3 s is followed by 150 s of training, though every 10 s were asked for."""
    now = 0.0
    monkeypatch.setattr("sdpipe.training.loop.time.monotonic", lambda: now)

    class SlowFolder:
        def save(self, _checkpoint: object) -> None:
            nonlocal now
            now += 3.0

    class Idle:
        def checkpoint(self) -> None:
            """Has no state."""

    saver = Saver(SlowFolder(), CheckpointConfig(every_s=10.0, every_steps=7), ALONE)  # type: ignore[arg-type]
    assert [step for step in range(1, 22) if saver.is_due(step)] == [7, 14, 21]
    now = 9.9
    assert not saver.is_due(1)
    now = 10.0
    assert saver.is_due(1)
    saver.save(Idle())  # type: ignore[arg-type]
    now = 13.0 + 149.9
    assert not saver.is_due(2)
    now = 13.0 + 150.0
    assert saver.is_due(2)


# ---------------------------------------------------------------- the device


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


def test_more_processes_than_cuda_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked of the device that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    says = "process 1 of this machine has no CUDA device; there are 1"
    with pytest.raises(DeviceError, match=says), joined_world("auto"):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU")
@pytest.mark.parametrize("overrides", [{}, AUGMENTED], ids=["arrays", "pictures"])
def test_no_step_waits_for_the_device(dataset: DataSet, tmp_path: Path, overrides: dict[str, object]) -> None:
    """The first step warms up; PyTorch raises where one of the next three synchronises."""
    data = make_pictures(tmp_path) if overrides else dataset
    config = train_config(device="cuda", precision="auto", p_L=1.0, **overrides)
    trainer = Trainer(config, data, choose_compute("cuda", "auto"), ALONE, workers=0)
    steps = trainer.steps()
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("one_shape", [True, False])
def test_cudnn_searches_only_where_batches_have_one_shape(
    monkeypatch: pytest.MonkeyPatch, one_shape: bool
) -> None:
    """Segments have many lengths, and it would search again for each."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not one_shape)
    cuda = {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_name": "a GPU",
        "is_bf16_supported": True,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_args, value=value, **_keys: value)
    chosen = choose_compute("cuda", "auto", one_shape=one_shape)
    assert torch.backends.cudnn.benchmark == one_shape
    assert ("cuDNN's search" in chosen.reason) == one_shape


def test_validations_within_an_epoch(dataset: DataSet, tmp_path: Path) -> None:
    """96 images in batches of 16 are 6 steps: with one every 4 an epoch is validated after 4 and after 6.

    The steps are the same as without, and so are the epochs' last validations.
    """
    often = train_alone(train_config(validate_steps=4), dataset, tmp_path / "often")
    seldom = train_alone(train_config(), dataset, tmp_path / "seldom")
    history = often.progress.history
    assert [row.epoch for row in history] == pytest.approx([4 / 6, 1, 1 + 4 / 6, 2, 2 + 4 / 6, 3])
    whole = [row for row in history if row.epoch == int(row.epoch)]
    for ours, theirs in zip(whole, seldom.progress.history, strict=True):
        assert ours.validation_loss == theirs.validation_loss
    losses = [row.train_loss for row in history]
    assert seldom.progress.history[0].train_loss == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6)
    assert often.progress.best.validation_error == min(row.validation_error for row in history)


@pytest.mark.parametrize("kept", [1, 2])
def test_resume_between_validations_within_an_epoch(dataset: DataSet, tmp_path: Path, kept: int) -> None:
    """Continued inside an epoch, before or behind a validation: the same as never stopped."""
    config = train_config(validate_steps=2, epochs=2)
    whole = train_alone(config, dataset, tmp_path / "whole")

    class _StoppedError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if len(progress.history) == kept + 1:
            raise _StoppedError

    folder = tmp_path / "stopped"
    with pytest.raises(_StoppedError):
        train_alone(config, dataset, folder, every_steps=1, on_epoch=stop)
    continued = train_alone(config, dataset, folder)
    assert continued.progress.history == whole.progress.history
    assert all(torch.equal(tensor, continued.state[name]) for name, tensor in whole.state.items())


def test_p_L_warmup_starts_at_constant_depth(dataset: DataSet, tmp_path: Path) -> None:
    """In the first of two warm-up epochs all 9 blocks are active in every step, later fewer are."""
    history = train_alone(train_config(p_L_warmup_epochs=2, epochs=4), dataset, tmp_path).progress.history
    assert history[0].blocks_active == 9
    assert history[3].blocks_active < history[0].blocks_active

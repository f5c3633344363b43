"""A batch in parts: what is the large batch's, and what BatchNorm makes of it."""

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, CPU, train_config

from benchmarks.epochs import make_dataset as random_pixels
from sdpipe.data.store import DataSet
from sdpipe.errors import ConfigError
from sdpipe.training.images import ArrayImages
from sdpipe.training.step import PartDraws
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World


def batch_of(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return next(iter(trainer.batches.epoch(0, range(1), trainer.step.parts)))


def test_the_parts_of_a_batch_are_its_images(dataset: DataSet) -> None:
    whole = batch_of(Trainer(train_config(), dataset, CPU, ALONE))
    parts = batch_of(Trainer(train_config(micro_batches=5), dataset, CPU, ALONE))
    assert [len(labels) for _, labels in parts] == [3, 3, 3, 3, 4]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole[0][0])


@pytest.mark.parametrize(("micro_batches", "num_asked"), [(1, [5, 3, 1]), (3, [15, 2, 1])])
def test_mini_batches_that_are_made_together_are_the_same(
    dataset: DataSet, micro_batches: int, num_asked: list[int]
) -> None:
    """As a GPU makes them, from the middle of an epoch: 5 of 16 images each."""
    trainer = Trainer(train_config(micro_batches=micro_batches, shift_px=2, flip=True), dataset, CPU, ALONE)
    images, steps = trainer.images, range(1, trainer.steps_per_epoch)
    assert isinstance(images, ArrayImages)
    found = []
    for num_at_once, num in zip((1, 40, 1000), num_asked, strict=True):
        images.num_at_once = num_at_once
        with patch.object(images, "take", wraps=images.take) as take:
            batches = list(trainer.batches.epoch(2, steps, trainer.step.parts))
        assert take.call_count == num
        assert [len(parts) for parts in batches] == [micro_batches] * len(steps)
        found.append([pair for parts in batches for pair in parts])
    one_by_one, *together = found
    for others in together:
        for (images_NCHW, labels_N), (own_NCHW, own_N) in zip(one_by_one, others, strict=True):
            assert torch.equal(own_NCHW, images_NCHW)
            assert torch.equal(own_N, labels_N)
            assert own_NCHW.stride() == images_NCHW.stride()  # channels last, for the convolutions
            assert own_NCHW.data_ptr() % 32 == 0  # by which kernels may be chosen


@pytest.mark.parametrize("sums", [{"colour_jitter": 0.4}, {"lighting": 0.1}], ids=str)
def test_mini_batches_are_made_one_by_one_where_colours_are_summed(
    tmp_path: Path, sums: dict[str, float]
) -> None:
    """A GPU may add up in another order for another number of images: other bytes after a stop."""
    trainer = Trainer(train_config(**sums), random_pixels(tmp_path / "data", 48), CPU, ALONE)
    assert isinstance(trainer.images, ArrayImages)
    trainer.images.num_at_once = 1000
    with patch.object(trainer.images, "take", wraps=trainer.images.take) as take:
        assert len(list(trainer.batches.epoch(0, range(3), trainer.step.parts))) == 3
    assert take.call_count == 3


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
    loss = trainer.step.run(0, parts, lambda _part: PartDraws(active=active), 0.0)
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


@pytest.mark.parametrize("skip", ["B", "C"])
def test_so_are_those_of_a_learned_skip_whose_block_is_inactive(dataset: DataSet, skip: str) -> None:
    """It computes in every step: 0.1 mean(batch means) from 0, worked out from its outputs in float64.

    The branch beside it computes nothing, and keeps what it has.
    """
    trainer = Trainer(train_config(micro_batches=4, skip=skip), dataset, CPU, ALONE)
    block = trainer.network.blocks[3]
    outputs: list[torch.Tensor] = []
    block.projection.conv.register_forward_hook(lambda *seen: outputs.append(seen[-1].detach().double()))
    active = [True, True, True, False, True, False, True, True, True]
    trainer.step.run(0, batch_of(trainer), lambda _part: PartDraws(active=active), 0.0)
    assert [len(output) for output in outputs] == [4, 4, 4, 4]
    mean = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    variance = torch.stack([output.var(dim=(0, 2, 3)) for output in outputs]).mean(dim=0)
    norm = block.projection.bn
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-5)
    assert not block.branch.bn1.running_mean.any()


def test_parts_of_one_image_are_refused(dataset: DataSet) -> None:
    with pytest.raises(ConfigError, match=r"batch_size: 16 images are too few for 12 parts .*12 processes"):
        Trainer(train_config(), dataset, CPU, World(0, 12, 0))


def test_parts_in_which_every_block_would_be_active_are_refused(dataset: DataSet) -> None:
    """Of the images of each of 8 processes, 2, two would pass every block: that is constant depth.

    4 of a part are enough at p_L 0.5.
    """
    config = train_config(draw="sample")
    says = r"16 images are too few for 8 parts of at least 4 .*8 processes"
    with pytest.raises(ConfigError, match=says):
        Trainer(config, dataset, CPU, World(0, 8, 0))
    trainer = Trainer(train_config(draw="sample", micro_batches=4), dataset, CPU, ALONE)
    assert [part.stop - part.start for part in trainer.step.parts] == [4, 4, 4, 4]

"""Dropout's masks: functions of (seed, epoch, step, sample, block), whatever is computed beside them."""

import numpy as np
import pytest
import torch
from conftest import ALONE, CPU, train_config

from sdpipe.data.store import DataSet
from sdpipe.dropout import Dropout, hashes
from sdpipe.training.draws import Draws
from sdpipe.training.trainer import Trainer

SHAPE_CHW = torch.Size((3, 5, 7))


def keys(num: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(Draws(seed).dropout_keys(0, 0, 1, num)[0])


def test_hashes_are_murmurs() -> None:
    """Its upper half, against the finaliser as published, in NumPy's unsigned numbers."""
    found_NCHW = hashes(keys(4), SHAPE_CHW)
    places_HWC = np.arange(5 * 7 * 3, dtype=np.uint32).reshape(5, 7, 3) * np.uint32(0x9E3779B9)
    mixed = places_HWC.transpose(2, 0, 1) + keys(4).numpy().view(np.uint32)[:, None, None, None]
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    assert np.array_equal(found_NCHW.numpy().view(np.uint32) >> np.uint32(16), mixed >> np.uint32(16))


def test_a_share_is_zero_and_the_mean_is_kept() -> None:
    """Of 512,000 numbers of 40 images: the standard error of the share is sqrt(0.21 / 512,000) = 0.00064."""
    dropout, ones = Dropout(0.3), torch.ones(40, 32, 20, 20)
    dropout.keys_N = keys(40)
    dropped = dropout(ones)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=4 * 0.00064)
    assert torch.equal(dropout.eval()(ones), ones)
    nearly_all = Dropout(1 - 1e-12)
    nearly_all.keys_N = keys(40)
    assert not nearly_all(ones).any()


def test_masks_are_as_unlike_as_independent_ones() -> None:
    """Between images, and between a place and others of its image: no correlation over 5 standard errors."""
    kept_NP = (hashes(keys(64), torch.Size((16, 16, 16))) >= 0).flatten(1).float() * 2 - 1
    num_places = kept_NP.shape[1]
    between = torch.corrcoef(kept_NP).fill_diagonal_(0)
    assert between.abs().max() < 5 / num_places**0.5
    for apart in (1, 2, 16, 256, 1000):
        product = (kept_NP[:, apart:] * kept_NP[:, :-apart]).mean().item()
        assert abs(product) < 5 / (64 * (num_places - apart)) ** 0.5


def test_an_image_has_its_mask_alone_and_in_any_layout() -> None:
    dropout, images_NCHW = Dropout(0.5), torch.rand(6, *SHAPE_CHW)
    dropout.keys_N = keys(6)
    whole = dropout(images_NCHW)
    assert torch.equal(dropout(images_NCHW.contiguous(memory_format=torch.channels_last)), whole)
    dropout.keys_N = keys(6)[[4, 1]]
    assert torch.equal(dropout(images_NCHW[[4, 1]]), whole[[4, 1]])


def test_keys_are_a_function_of_seed_epoch_and_step() -> None:
    """Spread over all of int32: of 60,000 the mean deviates by 2^32 / sqrt(12 * 60,000)."""
    first = Draws(0).dropout_keys(1, 2, 3, 20_000)
    assert first.dtype == np.int32
    assert np.array_equal(Draws(0).dropout_keys(1, 2, 3, 20_000), first)
    assert abs(first.mean()) < 5 * 2**32 / (12 * 60_000) ** 0.5
    assert first.min() < -0.999 * 2**31
    assert first.max() > 0.999 * 2**31
    for other in (Draws(1).dropout_keys(1, 2, 3, 9), Draws(0).dropout_keys(2, 2, 3, 9)):
        assert not np.isin(other, first[:, :9]).any()
    assert not np.isin(Draws(0).dropout_keys(1, 3, 3, 9), first[:, :9]).any()


def dropouts_of(trainer: Trainer) -> list[Dropout]:
    return [module for module in trainer.network.modules() if isinstance(module, Dropout)]


def keys_used(dataset: DataSet, **overrides: object) -> list[torch.Tensor]:
    """Of one step at constant depth, the keys that each block's dropout has, of all parts together."""
    trainer = Trainer(train_config(dropout=0.2, p_L=1.0, **overrides), dataset, CPU, ALONE)
    seen: list[list[torch.Tensor]] = []
    for dropout in dropouts_of(trainer):
        of_block: list[torch.Tensor] = []
        seen.append(of_block)
        dropout.register_forward_pre_hook(
            lambda module, _inputs, of_block=of_block: of_block.append(module.keys_N.clone())
        )
    next(trainer.steps())
    return [torch.cat(of_block) for of_block in seen]


def test_a_sample_has_the_same_masks_in_parts_of_any_size(dataset: DataSet) -> None:
    """And in each block another one."""
    whole = keys_used(dataset)
    assert len(whole) == 9
    assert len(torch.cat(whole).unique()) == 9 * 16
    for num_parts in (2, 5):
        in_parts = keys_used(dataset, micro_batches=num_parts)
        assert all(map(torch.equal, in_parts, whole))


def test_a_sample_has_its_masks_when_blocks_are_drawn_for_each(dataset: DataSet) -> None:
    """A branch sees the images of its segment only, with the keys that they have where it sees all."""
    whole = keys_used(dataset)
    trainer = Trainer(train_config(dropout=0.2, draw="sample"), dataset, CPU, ALONE)
    segments = trainer.draws.segments(0, 0, 0, trainer.network.config.survival_probs, 16)
    next(trainer.steps())
    assert any(segment.start + segment.count > 16 for segment in segments)
    for dropout, keys_N, segment in zip(dropouts_of(trainer), whole, segments, strict=True):
        places = sorted((segment.start + at) % 16 for at in range(segment.count))
        assert dropout.keys_N is not None
        assert torch.equal(dropout.keys_N, keys_N[places])

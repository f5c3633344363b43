"""What a data set must be for a training, and what a processor must not be asked for."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_dataset, train_config

from sdpipe.data.store import DataSet
from sdpipe.errors import ConfigError, DataError
from sdpipe.training.compute import Compute
from sdpipe.training.inputs import check_fits, split

FP32 = Compute(device=torch.device("cpu"), precision="fp32", reason="")
BF16 = Compute(device=torch.device("cpu"), precision="bf16", reason="")


@pytest.mark.parametrize("skip", ["B", "C"])
def test_projections_that_write_beyond_their_memory_are_refused(tmp_path, skip: str) -> None:
    """Strided, of fewer than 16 channels, fp32, large images: PyTorch 2.14 ends in a crash, or does not."""
    large, small = make_dataset(tmp_path / "large", size=64), make_dataset(tmp_path / "small", size=32)
    narrow, wide = train_config(skip=skip, widths=[8, 16, 16]), train_config(skip=skip, widths=[16, 16, 32])
    with pytest.raises(
        ConfigError, match=rf"train.widths: skip {skip} .* at least 16 channels where 64 pixels .* got 8"
    ):
        check_fits(narrow, large, FP32)
    for config, dataset, compute in (
        (narrow, small, FP32), (narrow, large, BF16), (wide, large, FP32),
        (train_config(widths=[8, 16, 16]), large, FP32),
    ):  # fmt: skip
        check_fits(config, dataset, compute)


def test_no_class_may_lose_all_its_images_to_the_validation(tmp_path) -> None:
    """It would never be learned, and nothing would say so."""
    dataset = make_dataset(tmp_path / "data")
    assert set(dataset.train_labels_N) == {0, 1, 2}
    labels_N = dataset.train_labels_N.copy()
    config = train_config(validation=0.5, batch_size=4)
    train, validation = split(config, dataset)
    assert np.array_equal(np.sort([*train, *validation]), np.arange(len(labels_N)))
    labels_N[train] = 0
    labels_N[validation] = 1
    labels_N[train[0]] = 2
    lost = replace(dataset, train_labels_N=labels_N)
    name = re.escape(dataset.class_names[1])
    with pytest.raises(DataError, match=rf"train.validation: 0.5 .* all {len(validation)} .* class {name}; "):
        split(config, lost)
    own = replace(lost, train_parts=(("train", len(train)), ("validation", len(validation))))
    own.train_labels_N.sort()
    own.train_labels_N[:] = np.where(np.arange(len(labels_N)) < len(train), [0, 2] * (len(labels_N) // 2), 1)
    message = rf"no image of the class {name} is left .* but {len(validation)} in the validation part$"
    with pytest.raises(DataError, match=message):
        split(config, own)


def test_images_that_are_too_small_are_refused(tmp_path) -> None:
    """Of 17 pixels a side the strides leave 9, 5, 3 and 2 for the last one, of 16 one."""
    dataset = make_dataset(tmp_path / "data", size=16)
    check_fits(train_config(), dataset, FP32)
    config = train_config(family="imagenet", depth=18, widths=[4, 8, 8, 8])
    with pytest.raises(ConfigError, match="imagenet needs images of at least 17 pixels a side"):
        check_fits(config, dataset, FP32)
    check_fits(config, make_dataset(tmp_path / "enough", size=17), FP32)


def test_shifts_that_leave_nothing_of_an_image_are_refused(dataset: DataSet) -> None:
    """Of 9 pixels a shift by 8 leaves one."""
    check_fits(train_config(shift_px=8), dataset, FP32)
    with pytest.raises(ConfigError, match=r"train\.shift_px: expected less than the image size 9, got 9$"):
        check_fits(train_config(shift_px=9), dataset, FP32)


def test_fewer_images_than_a_batch_are_refused(dataset: DataSet) -> None:
    """Four fifths of 120 are 96: one step an epoch, but not of 97 images."""
    train, _ = split(train_config(batch_size=96), dataset)
    assert len(train) == 96
    with pytest.raises(DataError, match=r"train\.batch_size: 97 images asked for, 96 to train on"):
        split(train_config(batch_size=97), dataset)

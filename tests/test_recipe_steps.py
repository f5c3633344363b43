"""Three steps of each recipe, at its full architecture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from PIL import Image
from test_recipes import NAMES, config_of

from sdpipe.data.pictures import PictureFiles, make_table
from sdpipe.data.store import DataSet
from sdpipe.recipes import load_recipes
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World

PICTURES = ("imagenet", "digit-pictures")  # data sets whose images stay in their files
SIZES = {"cifar10": (32, 3, 10), "cifar100": (32, 3, 100), "svhn": (32, 3, 10), "digits": (8, 1, 10)}


def fake_pictures(dataset: str, num: int, folder: Path) -> DataSet:
    """In files of 300 x 280 pixels, three classes of 1,000; or of 40 x 40, all ten."""
    picture_px, size, classes, seen = (300, 224, 1000, 3) if dataset == "imagenet" else (40, 32, 10, 10)
    rng = np.random.default_rng(0)
    paths = [folder / f"{at}.png" for at in range(num)]
    for path in paths:
        pixels = rng.integers(0, 256, (picture_px, picture_px - 20 * (classes > 10), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)
    files = PictureFiles(
        root=folder,
        table=make_table(paths, folder),
        size_HW=(size, size),
        channels=3,
        crop_fraction=0.875,
    )
    test = np.stack([files.read(at) for at in range(3)])
    return DataSet(
        name=dataset,
        class_names=tuple(map(str, range(classes))),
        train_images=files,
        train_labels_N=np.arange(num, dtype=np.int64) % seen,
        test_images_NHWC=test,
        test_labels_N=np.arange(3),
        train_parts=(("train", num),),
        crop_fraction=0.875,
        digest="0" * 64,
    )


def fake_data(dataset: str, num: int, folder: Path) -> DataSet:
    if dataset in PICTURES:
        return fake_pictures(dataset, num, folder)
    size, channels, classes = SIZES[dataset]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    labels = np.arange(num, dtype=np.int64) % 10  # of 100 classes one would lose all to the validation
    half = num // 2
    parts = (("train", half), ("extra", num - half)) if dataset == "svhn" else (("train", num),)
    return DataSet(
        name=dataset,
        class_names=tuple(map(str, range(classes))),
        train_images=images,
        train_labels_N=labels,
        test_images_NHWC=images[:10],
        test_labels_N=labels[:10],
        train_parts=parts,
        crop_fraction=1.0,
        digest="0" * 64,
    )


# The networks of cifar10 or imagenet with another head, depth, dropout or survival probability; of skips
# those of skips-small, wider. That of 1202 layers takes three steps in test_recompute.py, too.
LIKE_OTHERS = (
    "cifar10-1202",
    *("cifar100", "cifar10-plain-data", "cifar100-plain-data"),
    *("depths", "dropout", "figure8-left", "figure8-right", "imagenet-he", "skips"),
)


def one_run_of_each_kind(name: str) -> list[str]:
    """The first run of each network, rule, way to draw, and of constant and stochastic depth."""
    kinds: dict[tuple[object, ...], str] = {}
    for run in load_recipes()[name].runs:
        config = config_of(name, run)
        network = (config.family, config.depth, config.skip, config.dropout)
        kinds.setdefault((*network, config.rule, config.draw, config.p_L == 1), run)
    return list(kinds.values())


def test_every_kind_of_network_is_tried() -> None:
    assert set(one_run_of_each_kind("imagenet-he")) == set(load_recipes()["imagenet-he"].runs)
    assert set(one_run_of_each_kind("degradation")) == set(load_recipes()["degradation"].runs)
    for name in ("depths", "draws", "skips"):
        assert set(one_run_of_each_kind(name)) == set(load_recipes()[name].runs)
    assert one_run_of_each_kind("figure8-left") == ["p50-linear", "p50-uniform", "p100-linear"]
    assert len(one_run_of_each_kind("figure8-right")) == 6 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in LIKE_OTHERS else name
        for name in NAMES
        if name != "pictures-20-56"
    ],
)
def test_three_steps_at_full_architecture(name: str, tmp_path: Path) -> None:
    """Every kind of network in a recipe loads, builds, and takes three steps, at both kinds of depth.

    The first has the recipe's own batch, the others 32 images. With 1202 layers all have 8; with ImageNet's
    224 x 224 pixels 4, in two parts.
    """
    for at, run in enumerate(one_run_of_each_kind(name)):
        config = config_of(name, run)
        changes: dict[str, Any] = {}
        if config.depth == 1202:
            changes = {"batch_size": 8}
        elif at > 0:
            changes = {"batch_size": 32}
        if config.dataset == "imagenet":
            changes = {"batch_size": 4, "micro_batches": 2}
        if isinstance(config.validation, dict):
            changes |= {"validation": dict.fromkeys(config.validation, 2)}
        config = config.model_copy(update=changes)
        data = fake_data(
            config.dataset, 4 * config.batch_size + (6 if config.dataset == "imagenet" else 60), tmp_path
        )
        trainer = Trainer(config, data, CPU, World(0, 1, 0), workers=1)
        before = torch.clone(trainer.network.head.weight)
        for _, _ in zip(range(3), trainer.steps(), strict=False):
            pass
        trainer.check_finite()
        assert trainer.num_steps == 3
        assert not torch.equal(before, trainer.network.head.weight)

"""What two processes and one train in tests/test_world.py: settings and data by name."""

from pathlib import Path

from conftest import make_dataset, train_config
from picture_files import AUGMENTED, make_pictures

from sdpipe.data.store import DataSet
from sdpipe.training.config import TrainConfig

_SETTINGS: dict[str, dict[str, object]] = {
    "arrays": {},
    "recompute": {"recompute": True},
    "pictures": AUGMENTED | {"dropout": 0.2},
}
VARIANTS = tuple(_SETTINGS)
_SETTINGS |= {"sample": {"draw": "sample"}, "sample-whole": {"draw": "sample", "micro_batches": 1}}


def config_of(variant: str) -> TrainConfig:
    """Two epochs of mini-batches in two parts, or in one for each process."""
    return train_config(epochs=2, milestones=[], **{"micro_batches": 2, **_SETTINGS[variant]})


def dataset_of(variant: str, folder: Path) -> DataSet:
    """Made in `folder`, the same in each process."""
    return make_pictures(folder) if variant == "pictures" else make_dataset(folder)

"""The data that a run was trained on, and its images for choices that the test part must not see.

N: images, H, W, C: height, width, channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdpipe.data.pictures import PictureFiles
from sdpipe.data.split import split_validation
from sdpipe.data.store import DataSet
from sdpipe.errors import DataError
from sdpipe.training.weights import ModelInfo


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredImages:
    """Some of a data set's training images, by slice: uint8 (N, H, W, C), as evaluation sees them."""

    images: np.ndarray | PictureFiles
    indices: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """Copied, or decoded, when asked for. Raises DataError if a picture cannot be read."""
        numbers = self.indices[wanted]
        if isinstance(self.images, PictureFiles):
            return np.stack([self.images.read(int(number)) for number in numbers])
        return np.asarray(self.images[numbers])

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All of them, batch after batch."""
        return (self[at : at + size] for at in range(0, len(self), size))

    def sample(self, count: int, seed: int) -> "StoredImages":
        """So many of them at random, or all if there are fewer; in their order."""
        order = np.random.default_rng(np.random.SeedSequence((seed, count))).permutation(len(self))
        chosen = np.sort(order[:count])
        return StoredImages(images=self.images, indices=self.indices[chosen], labels_N=self.labels_N[chosen])


def check_data(info: ModelInfo, dataset: DataSet) -> None:
    """Raise DataError unless the run was trained on this data set.

    The test part of another, or of this one split anew, may hold images that it was trained on.
    """
    if info.dataset_digest != dataset.digest:
        raise DataError(
            f"the run was trained on the data {info.dataset_digest[:16]}, data/{dataset.name} is "
            f"{dataset.digest[:16]}; run `dvc repro`"
        )


def open_held_out(info: ModelInfo, dataset: DataSet) -> tuple[StoredImages, StoredImages]:
    """The training part and the validation part, split as in the training.

    Raises DataError if the run was trained on other data.
    """
    check_data(info, dataset)
    labels_N, params = dataset.train_labels_N, info.train_params
    parts = split_validation(labels_N, dataset.train_parts, params["validation"], params["seed"])
    trained, validated = (
        StoredImages(images=dataset.train_images, indices=part, labels_N=labels_N[part]) for part in parts
    )
    return trained, validated

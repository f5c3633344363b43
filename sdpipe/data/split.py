"""Splits: test from all images, where a source has no test part, and the paper's validation part."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from sdpipe.errors import DataError


def split_stratified(
    labels: Sequence[int], fraction: float, seed: int, key: str
) -> tuple[list[int], list[int]]:
    """Indices (sorted) of a training and a test part that has `fraction` of each class.

    Raises DataError naming `key`, the section of params.yaml, where a class has too few images.
    """
    num_images, num_classes = len(labels), len(set(labels))
    num_test = math.ceil(fraction * num_images)
    num_train = num_images - num_test
    if min(num_train, num_test) < num_classes:
        raise DataError(
            f"{key}.test_fraction: {fraction} of {num_images} images leaves {num_train} to train on and "
            f"{num_test} to test on; expected at least {num_classes} of both, the number of classes"
        )
    train, test = train_test_split(range(num_images), test_size=num_test, random_state=seed, stratify=labels)
    return sorted(train), sorted(test)


def split_validation(
    labels_N: np.ndarray,
    train_parts: tuple[tuple[str, int], ...],
    validation: float | Mapping[str, int],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, sorted) of the training and of the validation images; together they are all images.

    validation: a fraction of the images, shuffled by the seed (0.1 makes CIFAR's 45,000 and 5,000); or
    images per class from each part (SVHN: {"train": 400, "extra": 200}, 6,000 in all). Source: paper
    section 4. A data set with a part named "validation" has its split already, and keeps it.
    Raises DataError if a part has too few images.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    starts = np.cumsum([0, *(count for _, count in train_parts)])
    ranges = {name: np.arange(starts[at], starts[at + 1]) for at, (name, _) in enumerate(train_parts)}
    if "validation" in ranges:
        chosen = ranges["validation"]
    elif isinstance(validation, Mapping):
        chosen = _choose_per_class(labels_N, ranges, validation, rng)
    else:
        chosen = rng.permutation(len(labels_N))[: round(validation * len(labels_N))]
    is_validation = np.zeros(len(labels_N), dtype=bool)
    is_validation[chosen] = True
    train, held_out = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    if not len(train) or not len(held_out):
        raise DataError(
            f"train.validation: {validation} of {len(labels_N)} images leaves {len(train)} to train on "
            f"and {len(held_out)} to validate on"
        )
    return train, held_out


def _choose_per_class(
    labels_N: np.ndarray,
    ranges: dict[str, np.ndarray],
    validation: Mapping[str, int],
    rng: np.random.Generator,
) -> np.ndarray:
    chosen = []
    for part, count in validation.items():
        if part not in ranges:
            raise DataError(f"train.validation.{part}: the data set has the parts {', '.join(ranges)}")
        for k in np.unique(labels_N):
            members = ranges[part][labels_N[ranges[part]] == k]
            if len(members) < count:
                raise DataError(
                    f"train.validation.{part}: {count} of class {k} asked for, {len(members)} there"
                )
            chosen.append(rng.permutation(members)[:count])
    return np.concatenate(chosen)

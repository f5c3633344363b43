"""Pictures whose classes are known, in a folder for each: how many of them a deployed file gets wrong."""

import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdpipe.errors import DataError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.predictor import Prediction, predict
from sdpipe.runtime.sources import Failure, expand


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A picture's class by its folder, and what became of it."""

    label: str
    result: Prediction | Failure

    @property
    def is_wrong(self) -> bool:
        """Whether the network names another class."""
        return isinstance(self.result, Prediction) and self.result.top[0][0] != self.label


class Scores:
    """Counts of what the pictures are (rows) and are taken for (columns), K classes each."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.counts_KK = np.zeros((len(class_names), len(class_names)), np.int64)
        self.num_failed = 0
        self._number = {name: k for k, name in enumerate(class_names)}

    def add(self, one: Labelled) -> None:
        """Count one picture; one that could not be read is not among those that are judged."""
        if isinstance(one.result, Failure):
            self.num_failed += 1
        else:
            self.counts_KK[self._number[one.label], self._number[one.result.top[0][0]]] += 1

    @property
    def num_images(self) -> int:
        """Pictures that were judged."""
        return int(self.counts_KK.sum())

    @property
    def num_wrong(self) -> int:
        """Those of another class than the network says."""
        return self.num_images - int(np.trace(self.counts_KK))

    def recall(self, k: int) -> float | None:
        """Of the pictures of a class, the share that is named so; None if it has no picture."""
        return _share(self.counts_KK[k, k], self.counts_KK[k].sum())

    def precision(self, k: int) -> float | None:
        """Of the pictures named so, the share that is of the class; None if none is named so."""
        return _share(self.counts_KK[k, k], self.counts_KK[:, k].sum())


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def predict_labelled(artifact: Artifact, root: Path, *, batch_size: int) -> Iterator[Labelled]:
    """Predict the pictures of `root/<class>/**/*`, class by class, each folder sorted.

    Raises DataError, before the first, if a folder is named like none of the network's classes, or none is.
    """
    folders = _class_folders(root, artifact.metadata.class_names)
    labels: deque[str] = deque()

    def files() -> Iterator[str | Failure]:
        for label, folder in folders:
            for file in expand([str(folder)]):
                labels.append(label)
                yield file

    for result in predict(artifact, files(), top_k=1, batch_size=batch_size):
        yield Labelled(label=labels.popleft(), result=result)


def _class_folders(root: Path, class_names: Sequence[str]) -> list[tuple[str, Path]]:
    """Names are compared as composed letters: file systems keep an accent in one way or the other."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    by_name = {unicodedata.normalize("NFC", name): name for name in class_names}
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    found = [(by_name.get(unicodedata.normalize("NFC", path.name)), path) for path in folders]
    known = ", ".join(class_names[:5]) + ", ..." * (len(class_names) > 5)
    if not found:
        raise DataError(f"{root}: expected folders named like the network's classes ({known}), found none")
    for name, path in found:
        if name is None:
            raise DataError(f"{path}: not one of the network's {len(class_names)} classes ({known})")
    return [(name, path) for name, path in found if name is not None]

"""Pictures whose classes are known, in a folder for each: how many of them a deployed file gets wrong."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdpipe.errors import DataError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.folders import OF_ARCHIVERS, composed, files_of_class
from sdpipe.runtime.image import image_suffixes
from sdpipe.runtime.predictor import Prediction, predict
from sdpipe.runtime.sources import Failure, ending_of


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


def predict_labelled(
    artifact: Artifact, files: Iterable[tuple[str, str | Failure]], *, batch_size: int
) -> Iterator[Labelled]:
    """Predict the files that `list_labelled` finds, in their order."""
    labels: deque[str] = deque()

    def unlabelled() -> Iterator[str | Failure]:
        for label, file in files:
            labels.append(label)
            yield file

    for result in predict(artifact, unlabelled(), top_k=1, batch_size=batch_size):
        yield Labelled(label=labels.popleft(), result=result)


def list_labelled(
    root: Path, class_names: Sequence[str], passed_over: Callable[[str], None] = lambda _name: None
) -> Iterator[tuple[str, str | Failure]]:
    """Class and name of each picture in `root/<class>/**/*`, as training on such folders reads them.

    A class such as T-shirt/top is the folder top in T-shirt. passed_over: called with each file that is in no
    class folder, or is no picture by its name. Raises DataError, before the first, if a folder is none of
    these classes, or what is named like one is no folder.
    """
    if not root.is_dir():
        found = "no such folder" if not root.exists() else "expected a folder of class folders, found a file"
        raise DataError(f"{root}: {found}")
    folders = list(_class_folders(root, "", class_names, passed_over))
    if not folders:
        raise DataError(
            f"{root}: expected folders named like the network's classes ({_some(class_names)}), found none"
        )
    for label, folder in folders:
        for file in _pictures(folder, passed_over):
            yield label, file


def _class_folders(
    folder: Path, prefix: str, class_names: Sequence[str], passed_over: Callable[[str], None]
) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        label = _class_named(name, class_names)
        if label is not None and path.is_dir():
            yield label, path
        elif label is not None:
            raise DataError(f"{path}: named like a class; expected a folder of its pictures")
        elif path.name.startswith(".") or path.name == OF_ARCHIVERS:
            continue
        elif not path.is_dir():
            passed_over(str(path))
        elif any(each.startswith(f"{name}/") for each in class_names):
            yield from _class_folders(path, f"{name}/", class_names, passed_over)
        else:
            raise DataError(
                f"{path}: not one of the network's {len(class_names)} classes ({_some(class_names)})"
            )


def _class_named(name: str, class_names: Sequence[str]) -> str | None:
    """The name as it is, else the only one of the same letters."""
    if name in class_names:
        return name
    alike = [each for each in class_names if composed(each) == composed(name)]
    return alike[0] if len(alike) == 1 else None


def _some(class_names: Sequence[str]) -> str:
    return ", ".join(class_names[:5]) + ", ..." * (len(class_names) > 5)


def _pictures(folder: Path, passed_over: Callable[[str], None]) -> Iterator[str | Failure]:
    """Below a class folder; a folder that cannot be listed is a failure."""
    endings = image_suffixes()
    unreadable: list[OSError] = []
    for path in files_of_class(folder, unreadable.append):
        if ending_of(path.name) in endings:
            yield str(path)
        else:
            passed_over(str(path))
    for error in unreadable:
        message = f"cannot be listed: {error.strerror}"
        yield Failure(file=str(error.filename), code="unreadable", message=message)

"""Pictures in, labels and probabilities out, batch after batch at a steady memory footprint."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdpipe.errors import ImageError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.image import MAX_BYTES, decode, image_suffixes

if TYPE_CHECKING:  # most predictions do not load it
    from sdpipe.runtime.uncertainty import Ensemble, Uncertainty

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one picture: (label, probability), most probable first."""

    file: str
    top: list[tuple[str, float]]
    uncertainty: "Uncertainty | None" = None  # of the first label, where an ensemble was asked


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A picture that could not be predicted, and why."""

    file: str
    code: str
    message: str


def expand(arguments: Iterable[str]) -> Iterator[str | Failure]:
    """File names for arguments that are files, folders (searched through, sorted), globs or `-`."""
    for argument in arguments:
        if argument == STDIN:
            yield argument
        elif not _exists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  Path.glob refuses absolute ones
            for match in matches:
                yield from _in_folder(match) if Path(match).is_dir() else [match]
            if not matches:
                yield Failure(file=argument, code="not_found", message="no file matches")
        elif not argument:
            yield Failure(file=argument, code="not_found", message="an empty file name")
        else:
            # What is neither folder nor file is the decoder's to explain.
            yield from _in_folder(argument) if _exists(argument) and Path(argument).is_dir() else [argument]


def _exists(name: str) -> bool:
    try:
        return bool(name) and os.path.lexists(name)
    except ValueError:  # a NUL byte in the name
        return False


def _in_folder(folder: str) -> Iterator[str | Failure]:
    """Pictures of a folder and those below it, sorted; hidden ones are left out."""
    endings = image_suffixes()
    unreadable: list[OSError] = []
    found = 0
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in endings:
                found += 1
                yield str(Path(parent) / name)
    for error in unreadable:
        yield Failure(
            file=str(error.filename), code="no_permission", message=f"cannot be listed: {error.strerror}"
        )
    if not found and not unreadable:
        yield Failure(file=folder, code="no_pictures", message="the folder holds no pictures")


def predict(
    artifact: Artifact,
    files: Iterable[str | Failure],
    *,
    top_k: int,
    batch_size: int,
    ensemble: "Ensemble | None" = None,
) -> Iterator[Prediction | Failure]:
    """Predict in input order; one result for each file. Memory holds one batch.

    ensemble: adds to each prediction how its sub-networks see the label.
    """
    waiting: list[Failure | str] = []
    images: list[np.ndarray] = []
    for file in files:
        decoded = file if isinstance(file, Failure) else _decode(artifact, file)
        if isinstance(decoded, Failure):
            waiting.append(decoded)
        else:
            images.append(decoded)
            waiting.append(str(file))
        # A single bad file is reported when its batch is; a thousand of them do not pile up.
        if len(images) == batch_size or len(waiting) >= 2 * batch_size:
            yield from _predict_batch(artifact, waiting, images, top_k, ensemble)
            waiting, images = [], []
    yield from _predict_batch(artifact, waiting, images, top_k, ensemble)


def _decode(artifact: Artifact, file: str) -> np.ndarray | Failure:
    metadata = artifact.metadata
    height, width = metadata.image_size
    try:
        source = _read_stdin() if file == STDIN else Path(file)
        if isinstance(source, bytes) and len(source) > MAX_BYTES:
            raise ImageError("too_large", f"is over {MAX_BYTES // 2**20} MiB")
        return decode(source, metadata.channels, (height, width), metadata.crop_fraction)
    except ImageError as error:
        return Failure(file=file, code=error.code, message=str(error))


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("unreadable", "standard input is closed")
    return sys.stdin.buffer.read(MAX_BYTES + 1)


def _predict_batch(
    artifact: Artifact,
    waiting: list[Failure | str],
    images: list[np.ndarray],
    top_k: int,
    ensemble: "Ensemble | None",
) -> Iterator[Prediction | Failure]:
    judged: list[Uncertainty | None] = [None] * len(images)
    probabilities_NK: np.ndarray = np.empty((0, 0))
    if images:
        images_NHWC = np.stack(images)
        _, probabilities_NK = artifact.run(images_NHWC)
        if ensemble is not None:
            judged = [*ensemble.judge(images_NHWC, probabilities_NK.argmax(axis=1))]
    rows = zip(probabilities_NK, judged, strict=True)
    for entry in waiting:
        if isinstance(entry, Failure):
            yield entry
        else:
            probabilities_K, uncertainty = next(rows)
            top = _top(artifact, probabilities_K, top_k)
            yield Prediction(file=entry, top=top, uncertainty=uncertainty)


def _top(artifact: Artifact, probabilities_K: np.ndarray, top_k: int) -> list[tuple[str, float]]:
    best = np.argsort(-probabilities_K, kind="stable")[:top_k]
    return [(artifact.metadata.class_names[k], float(probabilities_K[k])) for k in best]

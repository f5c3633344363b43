"""Pictures in, labels and probabilities out, batch after batch at a steady memory footprint."""

import glob
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdpipe.errors import ImageError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.image import MAX_BYTES, decode, image_suffixes

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one picture: (label, probability), most probable first."""

    file: str
    top: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A picture that could not be predicted, and why."""

    file: str
    code: str
    message: str


def expand(arguments: Iterable[str]) -> Iterator[str | Failure]:
    """File names for arguments that are files, folders (searched through, sorted), globs or `-`."""
    for argument in arguments:
        path = Path(argument)
        if argument == STDIN or _exists(path):
            yield from _in_folder(path) if argument != STDIN and path.is_dir() else [argument]
        elif glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207  Path.glob refuses absolute patterns
            yield from expand(matches)
            if not matches:
                yield Failure(file=argument, code="not_found", message="no file matches")
        else:
            yield argument  # the decoder says what is wrong with it


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or has a NUL byte
        return False


def _in_folder(folder: Path) -> Iterator[str | Failure]:
    endings = image_suffixes()
    try:
        names = sorted(
            str(path) for path in folder.rglob("*") if path.suffix.lower() in endings and not path.is_dir()
        )
    except OSError as error:
        yield Failure(file=str(folder), code="unreadable", message=f"cannot be listed: {error.strerror}")
        return
    yield from names
    if not names:
        yield Failure(file=str(folder), code="no_pictures", message="the folder holds no pictures")


def predict(
    artifact: Artifact, files: Iterable[str | Failure], *, top_k: int, batch_size: int
) -> Iterator[Prediction | Failure]:
    """Predict in input order; one result for each file. Memory holds one batch."""
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
            yield from _predict_batch(artifact, waiting, images, top_k)
            waiting, images = [], []
    yield from _predict_batch(artifact, waiting, images, top_k)


def _decode(artifact: Artifact, file: str) -> np.ndarray | Failure:
    metadata = artifact.metadata
    height, width = metadata.image_size
    try:
        source = sys.stdin.buffer.read(MAX_BYTES + 1) if file == STDIN else Path(file)
        if isinstance(source, bytes) and len(source) > MAX_BYTES:
            raise ImageError("too_large", f"is over {MAX_BYTES // 2**20} MiB")
        return decode(source, metadata.channels, (height, width))
    except ImageError as error:
        return Failure(file=file, code=error.code, message=str(error))


def _predict_batch(
    artifact: Artifact, waiting: list[Failure | str], images: list[np.ndarray], top_k: int
) -> Iterator[Prediction | Failure]:
    rows = iter(artifact.run(np.stack(images))[1]) if images else iter(())
    for entry in waiting:
        if isinstance(entry, Failure):
            yield entry
        else:
            yield Prediction(file=entry, top=_top(artifact, next(rows), top_k))


def _top(artifact: Artifact, probabilities_K: np.ndarray, top_k: int) -> list[tuple[str, float]]:
    best = np.argsort(-probabilities_K, kind="stable")[:top_k]
    return [(artifact.metadata.class_names[k], float(probabilities_K[k])) for k in best]

"""Pictures in, labels and probabilities out, batch after batch at a steady memory footprint."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sdpipe.errors import ImageError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.image import Turn, centre_box, cut, open_picture
from sdpipe.runtime.memory import give_memory_back
from sdpipe.runtime.sources import STDIN, Failure, is_url, read_source

if TYPE_CHECKING:  # most predictions do not load it
    from sdpipe.runtime.uncertainty import Ensemble, Uncertainty

THUMBNAIL_SIDE = 160
"""Pixels of the longer side."""

_NUM_THREADS = 8
_TASK_BYTES = 2**15  # 32 x 32 pixels as a PNG take 0.1 ms, as handing it to a thread does


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one picture: (label, probability), most probable first."""

    file: str
    top: list[tuple[str, float]]
    uncertainty: "Uncertainty | None" = None  # of the first label, where an ensemble was asked
    thumbnail: Image.Image | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """One decoded: uint8 (H, W, C)."""

    file: str
    pixels_HWC: np.ndarray
    thumbnail: Image.Image | None


def predict(
    artifact: Artifact,
    files: Iterable[str | Failure],
    *,
    top_k: int,
    batch_size: int,
    num_thumbnails: int = 0,
    ensemble: "Ensemble | None" = None,
) -> Iterator[Prediction | Failure]:
    """Predict in input order; one result for each file.

    The next pictures are decoded while the network computes. Memory holds three batches, or one and 8
    pictures where that is more. num_thumbnails: the first so many files' predictions carry a small copy of
    the picture. ensemble: adds to each prediction how its sub-networks see the label.
    """
    waiting: list[_Picture | Failure] = []
    num_images = 0
    for decoded in _decode_ahead(artifact, files, max(2 * batch_size, _NUM_THREADS), num_thumbnails):
        waiting.append(decoded)
        num_images += isinstance(decoded, _Picture)
        # A single bad file is reported when its batch is; a thousand of them do not pile up.
        if num_images == batch_size or len(waiting) >= 2 * batch_size:
            yield from _predict_batch(artifact, waiting, top_k, ensemble)
            waiting, num_images = [], 0
    yield from _predict_batch(artifact, waiting, top_k, ensemble)


def _decode_ahead(
    artifact: Artifact, files: Iterable[str | Failure], ahead: int, num_thumbnails: int
) -> Iterator[_Picture | Failure]:
    numbered = enumerate(files)
    first = list(islice(numbered, 2))
    if len(first) < 2:  # one picture needs no threads, nor what they import
        yield from (_decode(artifact, file, number < num_thumbnails) for number, file in first)
        return
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial
    from itertools import chain
    from threading import Event

    def decode(task: _Task) -> list[_Picture | Failure]:
        return [
            _decode(artifact, file, number < num_thumbnails, is_given_up.is_set)
            for number, file in task
            if not is_given_up.is_set()
        ]

    give_memory_back()
    is_given_up = Event()
    pool = ThreadPoolExecutor(_NUM_THREADS)  # however few the cores: URLs are waited for
    decoding: deque[tuple[int, Callable[[], list[_Picture | Failure]]]] = deque()
    num_ahead = 0
    try:
        for task in _tasks(chain(first, numbered), ahead // _NUM_THREADS):
            if task[0][1] == STDIN:  # a thread that waits for it could not be interrupted
                decoding.append((1, partial(decode, task)))
            else:
                decoding.append((len(task), pool.submit(decode, task).result))
            num_ahead += len(task)
            while num_ahead > ahead:
                num, result = decoding.popleft()
                num_ahead -= num
                yield from result()
        for _, result in decoding:
            yield from result()
    finally:
        is_given_up.set()  # or the end of the process would wait for what is begun
        pool.shutdown(wait=False, cancel_futures=True)


_Task = list[tuple[int, str | Failure]]
"""Files with their numbers, one behind the other, that are decoded by one thread."""


def _tasks(numbered: Iterable[tuple[int, str | Failure]], most: int) -> Iterator[_Task]:
    """Several files to a task, at most so many, where handing them over costs as much as decoding them."""
    task: _Task = []
    num_bytes = 0
    for number, file in numbered:
        size = _num_bytes(file)
        if task and (num_bytes + size > _TASK_BYTES or len(task) == most):
            yield task
            task, num_bytes = [], 0
        task.append((number, file))
        num_bytes += size
    if task:
        yield task


def _num_bytes(file: str | Failure) -> int:
    """More than a task's of what is waited for, so that it has one by itself."""
    if isinstance(file, Failure):
        return 0
    if file == STDIN or is_url(file):
        return _TASK_BYTES + 1
    try:
        return os.stat(file).st_size  # noqa: PTH116  a Path takes as long again
    except (OSError, ValueError):  # the decoder's to explain
        return 0


def _decode(
    artifact: Artifact,
    file: str | Failure,
    with_thumbnail: bool,
    is_given_up: Callable[[], bool] = lambda: False,
) -> _Picture | Failure:
    if isinstance(file, Failure):
        return file
    metadata = artifact.metadata
    height, width = metadata.image_size
    try:
        with Turn() as turn:
            picture = open_picture(read_source(file, is_given_up), metadata.channels, turn)
            box = centre_box((picture.height, picture.width), (height, width), metadata.crop_fraction)
            return _Picture(
                file=file,
                pixels_HWC=cut(picture, box, (height, width)),
                thumbnail=_thumbnail(picture) if with_thumbnail else None,
            )
    except ImageError as error:
        return Failure(file=file, code=error.code, message=str(error))


def _thumbnail(picture: Image.Image) -> Image.Image:
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))  # in place; the pixels were cut out before
    return picture


def _predict_batch(
    artifact: Artifact, waiting: list[_Picture | Failure], top_k: int, ensemble: "Ensemble | None"
) -> Iterator[Prediction | Failure]:
    images = [entry.pixels_HWC for entry in waiting if isinstance(entry, _Picture)]
    judged: list[Uncertainty | None] = [None] * len(images)
    probabilities_NK: np.ndarray = np.empty((0, 0))
    if images:
        images_NHWC = np.stack(images)
        probabilities_NK = artifact.probabilities(images_NHWC)
        if ensemble is not None:
            judged = [*ensemble.judge(images_NHWC, probabilities_NK.argmax(axis=1))]
    rows = zip(_tops(artifact, probabilities_NK, top_k), judged, strict=True)
    for entry in waiting:
        if isinstance(entry, Failure):
            yield entry
        else:
            top, uncertainty = next(rows)
            yield Prediction(file=entry.file, top=top, thumbnail=entry.thumbnail, uncertainty=uncertainty)


def _tops(artifact: Artifact, probabilities_NK: np.ndarray, top_k: int) -> Iterator[list[tuple[str, float]]]:
    names = artifact.metadata.class_names
    best_NK = np.argsort(-probabilities_NK, axis=1, kind="stable")[:, :top_k]
    values_NK = np.take_along_axis(probabilities_NK, best_NK, axis=1)
    for best, values in zip(best_NK.tolist(), values_NK.tolist(), strict=True):
        yield [(names[k], value) for k, value in zip(best, values, strict=True)]

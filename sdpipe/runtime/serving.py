"""Pictures out of a request in, labels and probabilities out: what a server needs beside the ONNX file."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdpipe.errors import ImageError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.image import MAX_BYTES, decode
from sdpipe.runtime.metadata import Metadata

MAX_PICTURES = 1024
"""More pictures in one request are refused."""

NUM_TOP = 5
"""So many classes at most are listed by falling probability."""

_BATCH = 64  # pictures at a time, so that a large request needs no more memory than its pixels


def answer(artifact: Artifact, pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """What the network says of each picture, in order.

    A picture is an encoded file (bytes, or text in base64) or its pixels (rows of pixels of channels, whole
    numbers 0 to 255, of the network's size). Answers: {"label", "probability", "top": [{"label",
    "probability"}], "probabilities": {label: probability}}. Raises ImageError naming the first picture,
    counted from 1, that is none of this.
    """
    if not pictures:
        raise ImageError("empty", "the request holds no picture")
    if len(pictures) > MAX_PICTURES:
        raise ImageError("too_many", f"{len(pictures):,} pictures in one request, at most {MAX_PICTURES:,}")
    images_NHWC = np.stack(
        [_pixels(picture, number, artifact.metadata) for number, picture in enumerate(pictures, start=1)]
    )
    names = artifact.metadata.class_names
    answers = []
    for start in range(0, len(images_NHWC), _BATCH):
        probabilities_NK = artifact.probabilities(images_NHWC[start : start + _BATCH])
        answers += [_describe(names, probabilities_K) for probabilities_K in probabilities_NK]
    return answers


def _pixels(picture: Any, number: int, metadata: Metadata) -> np.ndarray:
    """One picture as uint8 (H, W, C)."""
    try:
        if isinstance(picture, str):
            picture = _from_base64(picture)
        if isinstance(picture, bytes):
            height, width = metadata.image_size
            return decode(picture, metadata.channels, (height, width), metadata.crop_fraction)
        return _from_numbers(picture, (*metadata.image_size, metadata.channels))
    except ImageError as error:
        raise ImageError(error.code, f"picture {number}: {error}") from error


def _from_base64(text: str) -> bytes:
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError("too_large", f"is over {MAX_BYTES // 2**20} MiB")
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # it is often wrapped into lines
    except (binascii.Error, ValueError) as error:
        raise ImageError("not_base64", f"is not base64: {error}") from error


def _from_numbers(picture: Any, shape_HWC: tuple[int, ...]) -> np.ndarray:
    expected = f"expected base64 text or pixels of shape {shape_HWC}, whole numbers 0 to 255"
    if not isinstance(picture, list | tuple | np.ndarray):
        raise ImageError("not_pixels", f"{expected}, got {type(picture).__name__}")
    try:
        values = np.asarray(picture)
    except (ValueError, OverflowError) as error:  # ragged rows
        raise ImageError("wrong_shape", f"{expected}, got rows of several lengths") from error
    if values.shape != shape_HWC:
        raise ImageError("wrong_shape", f"{expected}, got shape {values.shape}")
    if values.dtype.kind not in "iu":
        found = (
            values.dtype.name if values.dtype.kind != "f" or np.isfinite(values).all() else "NaN or infinity"
        )
        raise ImageError("not_pixels", f"{expected}, got {found}")
    if values.min() < 0 or values.max() > 255:
        raise ImageError("out_of_range", f"{expected}, got {values.min()} to {values.max()}")
    return values.astype(np.uint8)


def _describe(names: Sequence[str], probabilities_K: np.ndarray) -> dict[str, Any]:
    best = np.argsort(-probabilities_K, kind="stable")[:NUM_TOP]
    top = [{"label": names[k], "probability": float(probabilities_K[k])} for k in best]
    named = {name: float(probability) for name, probability in zip(names, probabilities_K, strict=True)}
    return {**top[0], "top": top, "probabilities": named}

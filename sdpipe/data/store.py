"""A fetched data set on disk: arrays that can be memory-mapped, and meta.json.

data/<dataset>/
    train_images.npy  uint8 (N, H, W, C)     test_images.npy
    train_labels.npy  int64 (N,)             test_labels.npy
    meta.json         classes, counts, source, SHA-256 of the arrays, images shared by both parts

Where training pictures stay in their files, train_files.npy (see pictures.py) stands in place of
train_images.npy, and the files below the source, or in data/<dataset>/pictures/.
"""

import errno
import hashlib
import io
import json
import os
import tokenize
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdpipe.data.pictures import PictureFiles, make_table
from sdpipe.errors import DataError
from sdpipe.files import local_path, sha256_of, write_json

_CHUNK = 4096  # images hashed or copied at a time

# What json and NumPy raise on damaged files.
_DAMAGED = (
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, None)
"""What the system says of a file that is missing or another thing; None: NumPy's own OSErrors, of damage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """A data set: images uint8 NHWC (memory-mapped) or, to train on, picture files; labels int64 (N,).

    crop_fraction: how pictures of another size are cut, see `sdpipe.runtime.image.centre_box`.
    train_parts: (name, count) of what the training images consist of, in order, such as
    (("train", 73257), ("extra", 531131)); a part named "validation" is used as such.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: np.ndarray | PictureFiles
    train_labels_N: np.ndarray
    test_images_NHWC: np.ndarray
    test_labels_N: np.ndarray
    train_parts: tuple[tuple[str, int], ...]
    crop_fraction: float
    digest: str

    @property
    def image_shape_HWC(self) -> tuple[int, int, int]:
        """Of each image."""
        height, width, channels = self.test_images_NHWC.shape[1:]
        return height, width, channels


PICTURES = "pictures"
"""The folder for picture files that are part of the data set."""


class ArrayWriter:
    """Writes `<part>_images.npy` and `<part>_labels.npy` chunk by chunk, with memory for one chunk."""

    def __init__(self, folder: Path, part: str, num_images: int, image_shape_HWC: tuple[int, ...]) -> None:
        path, shape = folder / f"{part}_images.npy", (num_images, *image_shape_HWC)
        self.images_NHWC = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        # A full disk is an error here; without the reservation it would be a SIGBUS at the first write.
        with path.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
        self.labels_N = np.zeros(num_images, dtype=np.int64)
        self._labels_path = folder / f"{part}_labels.npy"
        self._filled = 0

    def append(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> None:
        """Add images and their labels behind those already written."""
        end = self._filled + len(labels_N)
        for start in range(0, len(labels_N), _CHUNK):
            chunk = images_NHWC[start : start + _CHUNK]
            self.images_NHWC[self._filled + start : self._filled + start + len(chunk)] = chunk
        self.labels_N[self._filled : end] = labels_N
        self._filled = end

    def close(self) -> None:
        """Write everything out."""
        assert self._filled == len(self.labels_N), "fewer images appended than announced"
        self.images_NHWC.flush()
        _save(self._labels_path, self.labels_N)


def write_part(folder: Path, part: str, chunks: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write one part from (images, labels) pairs that are already in memory."""
    pairs = list(chunks)
    _check_shapes(part, [images_NHWC.shape[1:] for images_NHWC, _ in pairs])
    writer = ArrayWriter(folder, part, sum(len(labels) for _, labels in pairs), pairs[0][0].shape[1:])
    for images_NHWC, labels_N in pairs:
        writer.append(images_NHWC, labels_N)
    writer.close()


def write_files(folder: Path, pictures: list[tuple[Path, int]], root: Path) -> None:
    """Write the training part as a table of picture files below `root`, and their labels."""
    _save(folder / "train_files.npy", make_table([path for path, _ in pictures], root))
    _save(folder / "train_labels.npy", np.array([label for _, label in pictures], dtype=np.int64))


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array by way of memory: NumPy does not say that the disk was full, nor which file it was."""
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


def write_meta(
    folder: Path,
    *,
    name: str,
    class_names: list[str],
    source: dict[str, Any],
    train_parts: list[tuple[str, int]] | None = None,
    train_root: str | None = None,
    crop_fraction: float = 1.0,
) -> dict[str, Any]:
    """Check the arrays in `folder`, then write meta.json about them. Returns its content.

    train_root: of training pictures in files, as params.yaml names it; None: the folder's own.
    Raises DataError if labels and classes do not fit or a class has no training image.
    """
    train = "train_files" if (folder / "train_files.npy").exists() else "train_images"
    names = (train, "train_labels", "test_images", "test_labels")
    arrays = {array: np.load(folder / f"{array}.npy", mmap_mode="r") for array in names}
    num_train, num_test = len(arrays["train_labels"]), len(arrays["test_labels"])
    shared = None  # of files nobody knows without decoding them all
    if train == "train_images":
        _check_shapes(name, [arrays[train].shape[1:], arrays["test_images"].shape[1:]])
        shared = count_shared(arrays[train], arrays["test_images"])
    _check_classes(name, class_names, arrays["train_labels"], arrays["test_labels"])
    height, width, channels = arrays["test_images"].shape[1:]
    meta = {
        "name": name,
        "class_names": class_names,
        "image_size": [height, width],
        "channels": channels,
        "crop_fraction": crop_fraction,
        "train_root": train_root,
        "num_train": num_train,
        "num_test": num_test,
        "train_parts": [list(part) for part in train_parts or [("train", num_train)]],
        "train_images_per_class": np.bincount(arrays["train_labels"], minlength=len(class_names)).tolist(),
        "test_images_per_class": np.bincount(arrays["test_labels"], minlength=len(class_names)).tolist(),
        "test_images_also_in_train": shared,
        "source": source,
        "sha256": {array: sha256_of(folder / f"{array}.npy") for array in names},
    }
    write_json(folder / "meta.json", meta)
    return meta


def _check_shapes(name: str, shapes_HWC: list[tuple[int, ...]]) -> None:
    if len(set(shapes_HWC)) > 1:
        raise DataError(f"{name}: all images must have one shape, found {sorted(set(shapes_HWC))}")


def _check_classes(name: str, class_names: list[str], train_N: np.ndarray, test_N: np.ndarray) -> None:
    for part, labels_N in (("train", train_N), ("test", test_N)):
        if len(labels_N) == 0:
            raise DataError(f"{name}: the {part} part has no image")
        if labels_N.min() < 0 or labels_N.max() >= len(class_names):
            raise DataError(
                f"{name}: {part} labels run from {labels_N.min()} to {labels_N.max()}, "
                f"expected 0 to {len(class_names) - 1}"
            )
    for at, class_name in enumerate(class_names):
        if not class_name.isprintable() or class_name in class_names[:at]:
            raise DataError(f"{name}: class {class_name!r}: expected printable names, each once")
    missing = [
        class_names[k] for k in sorted(set(range(len(class_names))) - set(np.unique(train_N).tolist()))
    ]
    if missing:
        raise DataError(f"{name}: no training image of class {', '.join(missing)}")


def count_shared(train_images_NHWC: np.ndarray, test_images_NHWC: np.ndarray) -> int:
    """How many test images stand, pixel for pixel, among the training images too."""
    seen = {_image_digest(image) for image in train_images_NHWC}
    return sum(_image_digest(image) in seen for image in test_images_NHWC)


def _image_digest(image_HWC: np.ndarray) -> bytes:
    return hashlib.blake2b(image_HWC.tobytes(), digest_size=16).digest()


def open_dataset(folder: Path) -> DataSet:
    """Open a fetched data set; images are memory-mapped (copy on write), labels loaded.

    Raises DataError if it is not there or not whole, or cannot be read.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        num_train, num_test = int(meta["num_train"]), int(meta["num_test"])
        return DataSet(
            name=meta["name"],
            class_names=tuple(meta["class_names"]),
            train_images=_open_train_images(folder, meta),
            train_labels_N=np.array(_open_array(folder, "train_labels", np.int64, 1, num_train)),
            test_images_NHWC=_open_array(folder, "test_images", np.uint8, 4, num_test),
            test_labels_N=np.array(_open_array(folder, "test_labels", np.int64, 1, num_test)),
            train_parts=tuple((part, count) for part, count in meta["train_parts"]),
            crop_fraction=meta["crop_fraction"],
            # The arrays' digests decide, not where they were fetched from.
            digest=hashlib.sha256(
                json.dumps([meta["sha256"], meta["class_names"], meta["train_parts"]]).encode()
            ).hexdigest(),
        )
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in _GONE:  # it may be whole: no fetch helps
            raise DataError(f"{folder}: the data set cannot be read: {error}") from error
        raise DataError(
            f"{folder}: no whole data set: {error}; run `dvc repro fetch@{folder.name}`"
        ) from error


def check_arrays(folder: Path) -> None:
    """Compare the arrays of a data set that can be opened with what was fetched; reads all of them.

    Raises DataError naming one that was changed since: the digest of the data set is of what was fetched.
    """
    for array, digest in json.loads((folder / "meta.json").read_text())["sha256"].items():
        if sha256_of(folder / f"{array}.npy") != digest:
            raise DataError(
                f"{folder / array}.npy: not what was fetched; run `dvc repro -f -s fetch@{folder.name}`"
            )


def _open_train_images(folder: Path, meta: dict[str, Any]) -> np.ndarray | PictureFiles:
    if "train_images" in meta["sha256"]:
        return _open_array(folder, "train_images", np.uint8, 4, int(meta["num_train"]))
    root = meta["train_root"]
    height, width = meta["image_size"]
    return PictureFiles(
        root=folder / PICTURES if root is None else local_path(root),
        table=np.load(folder / "train_files.npy", mmap_mode="r"),
        size_HW=(height, width),
        channels=meta["channels"],
        crop_fraction=meta["crop_fraction"],
    )


def _open_array(folder: Path, name: str, dtype: type, num_dims: int, count: int) -> np.ndarray:
    """A memory-mapped array. Raises ValueError unless it has that type and as many rows as meta.json says."""
    array: np.ndarray = np.load(folder / f"{name}.npy", mmap_mode="c")
    if array.dtype != dtype or array.ndim != num_dims or len(array) != count:
        raise ValueError(
            f"{name}.npy: expected {count} rows of {np.dtype(dtype)} in {num_dims} dimensions, "
            f"found {array.dtype} {array.shape}"
        )
    return array

"""The published file formats, read without pickle: idx (MNIST), CIFAR's binary records, SVHN's .mat.

Images are uint8, NHWC; labels int64, shape (N,), from 0.
"""

import math
import zlib
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from sdpipe.errors import DataError

CIFAR_SIDE = 32
_IDX_UBYTE = 0x08
_IDX_MAX_DIMS = 3  # of what is read here: labels and grey images

# What scipy raises on damaged .mat files.
_DAMAGED_MAT = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MatReadError,
    NotImplementedError,
    OSError,
    TypeError,
    UnboundLocalError,
    ValueError,
    zlib.error,
)


def read_idx(raw: bytes, name: str) -> np.ndarray:
    """An array of unsigned bytes in idx format (http://yann.lecun.com/exdb/mnist: magic, sizes, data)."""
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _IDX_UBYTE:
        raise DataError(f"{name}: no idx file of unsigned bytes")
    num_dims = raw[3]
    if not 1 <= num_dims <= _IDX_MAX_DIMS:
        raise DataError(f"{name}: expected 1 to {_IDX_MAX_DIMS} dimensions, found {num_dims}")
    header = 4 + 4 * num_dims
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4))
    if len(raw) != header + math.prod(shape):
        raise DataError(
            f"{name}: {header + math.prod(shape)} bytes expected for shape {shape}, found {len(raw)}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path, num_label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one CIFAR .bin file (https://www.cs.toronto.edu/~kriz/cifar.html).

    A record is `num_label_bytes` (1 for CIFAR-10; 2 for CIFAR-100: coarse, fine) and 3,072 bytes of pixels,
    channel after channel. The last label byte counts.
    """
    record_bytes = num_label_bytes + 3 * CIFAR_SIDE * CIFAR_SIDE
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % record_bytes:
        raise DataError(f"{path.name}: {raw.size} bytes, expected whole records of {record_bytes}")
    records = raw.reshape(-1, record_bytes)
    images_NCHW = records[:, num_label_bytes:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return images_NCHW.transpose(0, 2, 3, 1), records[:, num_label_bytes - 1].astype(np.int64)


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one cropped-digits .mat file (http://ufldl.stanford.edu/housenumbers).

    X is (32, 32, 3, N) uint8, y is (N, 1) with 10 for the digit 0.
    """
    try:
        content = loadmat(path, variable_names=["X", "y"])
        images_HWCN, labels = content["X"], content["y"].ravel()
    except _DAMAGED_MAT as error:
        raise DataError(f"{path}: no SVHN file with X and y: {error}") from error
    if images_HWCN.dtype != np.uint8 or images_HWCN.ndim != 4 or images_HWCN.shape[3] != len(labels):
        raise DataError(f"{path}: X is {images_HWCN.dtype} {images_HWCN.shape} for {len(labels)} labels")
    if labels.dtype.kind not in "iuf" or not np.isin(labels, range(1, 11)).all():
        raise DataError(f"{path}: y: expected labels from 1 to 10, which stands for the digit 0")
    return images_HWCN.transpose(3, 0, 1, 2), labels.astype(np.int64) % 10

"""From stored pixels to what the network sees: statistics, normalisation, shift and flip, as tensors.

N: images, H, W, C: height, width, channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdpipe.errors import DataError

_CHUNK = 4096  # images summed at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Normalisation:
    """Pixels minus the per-pixel mean image, over one global standard deviation (code).

    mean_HWC: float32 (H, W, C), in pixel values 0..255; std: float32 scalar tensor.
    """

    mean_HWC: Tensor
    std: Tensor

    def __call__(self, images_NHWC: Tensor) -> Tensor:
        """Normalise uint8 images; float32, same shape."""
        return (images_NHWC.float() - self.mean_HWC) / self.std

    def to(self, device: torch.device) -> "Normalisation":
        """The same on a device."""
        return Normalisation(mean_HWC=self.mean_HWC.to(device), std=self.std.to(device))


def fit_normalisation(images_NHWC: np.ndarray, indices: np.ndarray) -> Normalisation:
    """Mean image and global standard deviation of the training part.

    indices: the training part's images; validation and test must not be among them.
    Sums are taken in float64: in float32 the mean of 50,000 pictures comes out a third too small.
    Raises DataError if all images are the same.
    """
    total_HWC = np.zeros(images_NHWC.shape[1:], dtype=np.float64)
    for chunk in _chunks(images_NHWC, indices):
        total_HWC += chunk.sum(axis=0, dtype=np.float64)
    mean_HWC = total_HWC / len(indices)
    squares = sum(float(np.square(chunk - mean_HWC).sum()) for chunk in _chunks(images_NHWC, indices))
    std = np.sqrt(squares / (len(indices) * mean_HWC.size))
    if std == 0:
        raise DataError("all training images are the same; nothing can be learned from them")
    return Normalisation(
        mean_HWC=torch.from_numpy(mean_HWC.astype(np.float32)), std=torch.tensor(std, dtype=torch.float32)
    )


def _chunks(images_NHWC: np.ndarray, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), _CHUNK):
        yield images_NHWC[indices[start : start + _CHUNK]]


def shift_and_flip(images_NHWC: Tensor, shifts_N2: Tensor, flips_N: Tensor, max_shift_px: int) -> Tensor:
    """Shift each normalised image by its (down, right) in pixels, zeros moving in; mirror where flagged.

    shifts_N2: int64 in [-max_shift_px, max_shift_px]; flips_N: bool. The border is 0 after normalisation
    (code), that is the mean image. One gather for the whole batch.
    """
    num, height, width = images_NHWC.shape[:3]
    pad = max_shift_px
    padded = F.pad(images_NHWC, (0, 0, pad, pad, pad, pad))
    device = images_NHWC.device
    rows_NH = pad - shifts_N2[:, :1] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns_NW = pad - shifts_N2[:, 1:] + torch.where(flips_N[:, None], columns.flip(0), columns)
    samples = torch.arange(num, device=device)
    return padded[samples[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]]

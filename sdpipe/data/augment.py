"""From stored pixels to what the network sees: statistics, normalisation, augmentation, as tensors.

N: images, H, W, C: height, width, channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdpipe.errors import DataError

_CHUNK = 256  # images summed at a time; of 224 x 224 pixels they take 0.6 GiB


# Of ImageNet's colours, in [0, 1]: eigenvalues, and eigenvectors as columns.
# Source: fb.resnet.torch, datasets/imagenet.lua.
_COLOUR_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_COLOUR_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_MAX_PIXEL = 255
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (fb.resnet.torch, datasets/transforms.lua)
_BRIGHTNESS, _CONTRAST = 0, 1  # numbers of the colour changes; saturation is 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Normalisation:
    """Pixels minus a mean, over a standard deviation.

    pixel: the mean image, float32 (H, W, C), and one global deviation, a scalar, that of the pixels before
    the mean image is subtracted (code).
    channel: both float32 (1, 1, C). In pixel values 0..255.
    """

    mean_HWC: Tensor
    std: Tensor

    def __call__(self, images_NHWC: Tensor) -> Tensor:
        """Normalise uint8 images; float32, same shape."""
        return (images_NHWC.float() - self.mean_HWC) / self.std

    def to(self, device: torch.device) -> "Normalisation":
        """The same on a device."""
        return Normalisation(mean_HWC=self.mean_HWC.to(device), std=self.std.to(device))


def fit_normalisation(
    images_NHWC: np.ndarray, indices: np.ndarray, kind: Literal["pixel", "channel"]
) -> Normalisation:
    """Mean and standard deviation of the training part.

    indices: the training part's images; validation and test must not be among them.
    Sums are taken in float64: in float32 the mean of 50,000 pictures comes out a third too small.
    Raises DataError if all images, or all values of a channel, are the same.
    """
    total_HWC = np.zeros(images_NHWC.shape[1:], dtype=np.float64)
    for chunk in _chunks(images_NHWC, indices):
        total_HWC += chunk.sum(axis=0, dtype=np.float64)
    mean_HWC = total_HWC / len(indices)
    if kind == "channel":
        mean_HWC = mean_HWC.mean(axis=(0, 1), keepdims=True)
    centre, axes = (mean_HWC.mean(), None) if kind == "pixel" else (mean_HWC, (0, 1, 2))
    squares = sum(np.square(chunk - centre).sum(axis=axes) for chunk in _chunks(images_NHWC, indices))
    num_values = len(indices) * images_NHWC[0].size // (1 if kind == "pixel" else images_NHWC.shape[-1])
    std = np.sqrt(squares / num_values)
    first_HWC = images_NHWC[indices[0]]
    if all((chunk == first_HWC).all() for chunk in _chunks(images_NHWC, indices)):
        raise DataError("all training images are the same; nothing can be learned from them")
    if not np.all(std):
        raise DataError(
            f"train.normalisation: channel {int(np.argmin(std))} has one value in all training images, so "
            "no deviation to divide by; expected pixel, or pictures without that channel"
        )
    return Normalisation(
        mean_HWC=torch.from_numpy(mean_HWC.astype(np.float32)),
        std=torch.tensor(std, dtype=torch.float32).reshape(() if kind == "pixel" else (1, 1, -1)),
    )


def _chunks(images_NHWC: np.ndarray, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), _CHUNK):
        yield images_NHWC[indices[start : start + _CHUNK]]


def shifted_pixels(shifts_N2: Tensor, flips_N: Tensor, size_HW: tuple[int, int], max_shift_px: int) -> Tensor:
    """Where each pixel of shifted images comes from: its H rows, then its W columns, int64 (N, H + W).

    shifts_N2: int64, (down, right) in [-max_shift_px, max_shift_px]; flips_N: bool, mirrored. The numbers are
    those of images with a border of max_shift_px on each side.
    """
    rows, columns = (torch.arange(size) for size in size_HW)
    rows_NH = max_shift_px - shifts_N2[:, :1] + rows
    columns_NW = max_shift_px - shifts_N2[:, 1:] + torch.where(flips_N[:, None], columns.flip(0), columns)
    return torch.cat([rows_NH, columns_NW], dim=1)


def take_pixels(images_NHWC: Tensor, pixels_NP: Tensor, max_shift_px: int) -> Tensor:
    """Normalised images with their pixels from where `shifted_pixels` says; zeros move in.

    The border is 0 after normalisation (code), that is the mean image. One gather for the whole batch.
    """
    pad = max_shift_px
    padded = F.pad(images_NHWC, (0, 0, pad, pad, pad, pad))
    height = images_NHWC.shape[1]
    rows_NH, columns_NW = pixels_NP[:, :height], pixels_NP[:, height:]
    samples = torch.arange(len(images_NHWC), device=images_NHWC.device)
    return padded[samples[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]]


@cache
def _constant(values: tuple[object, ...], device: torch.device) -> Tensor:
    """Copied to a device once: the copy waits for all that the device has to do."""
    return torch.tensor(values, device=device)


def jitter_colours(images_NHWC: Tensor, order_N3: Tensor, weights_N3: Tensor) -> Tensor:
    """Change brightness (0), contrast (1) and saturation (2) of each image, in its own order.

    images_NHWC: float32 RGB, pixel values 0..255; the result may leave that range. order_N3: int64, a
    permutation of 0, 1, 2 for each image. weights_N3: float32, what remains of the image at each of these
    places, about 1; the rest is black, its mean grey, or its grey picture.
    Source: fb.resnet.torch, datasets/transforms.lua.
    """
    luma = _constant(_LUMA, images_NHWC.device)
    for order_N, weight_N in zip(order_N3.unbind(1), weights_N3.unbind(1), strict=True):
        kind, weight = order_N[:, None, None, None], weight_N[:, None, None, None]
        grey = (images_NHWC * luma).sum(dim=3, keepdim=True)
        other = torch.where(kind == _CONTRAST, grey.mean(dim=(1, 2), keepdim=True), grey)
        images_NHWC = weight * images_NHWC + (1 - weight) * torch.where(kind == _BRIGHTNESS, 0, other)
    return images_NHWC


def light(images_NHWC: Tensor, alphas_N3: Tensor) -> Tensor:
    """Add to all pixels of an image a colour, drawn along the directions in which ImageNet's colours vary.

    images_NHWC: float32, pixel values 0..255; alphas_N3: float32, the weight of each direction.
    Source: fb.resnet.torch, datasets/transforms.lua; Krizhevsky et al. 2012, section 4.1.
    """
    device = images_NHWC.device
    values = _constant(_COLOUR_EIGENVALUES, device) * _MAX_PIXEL
    colours_N3 = (alphas_N3 * values) @ _constant(_COLOUR_EIGENVECTORS, device).T
    return images_NHWC + colours_N3[:, None, None, :]

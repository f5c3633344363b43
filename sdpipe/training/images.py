"""The images of a training, brought to the device by number: from arrays, or from picture files.

N: images of a batch, H, W, C: height, width, channels.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdpipe.errors import LoadingError
from sdpipe.training.compute import Compute
from sdpipe.training.world import World

Batch = TypeVar("Batch")
_DEVICE_SHARE = 3  # the images take at most 1/3 of the device's free memory
_PIXELS_AT_ONCE = 2**20  # of images that a GPU makes ready with one launch of each kernel


class Images(Protocol):
    """Images and labels by number."""

    num_pixels: int
    """Of each image."""
    num_at_once: int
    """About so many are best asked for together; 1: as they are needed."""

    def batches(
        self, wanted: Iterable[np.ndarray], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each array of numbers: images uint8 (N, H, W, C) and labels int64 (N,), on the device.

        epoch: that of the random crops; None: the pixels that evaluation sees.
        """


class ArrayImages:
    """Images of an array: no DataLoader, no worker processes.

    Arrays are memory-mapped, so the system keeps in memory what fits. On CUDA, images that fit into a third
    of the free device memory are copied there once, and several mini-batches are made ready together: their
    kernels take less time than a processor needs to launch them.
    """

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, compute: Compute) -> None:
        self.num_pixels = images_NHWC.shape[1] * images_NHWC.shape[2]
        self.num_at_once = 1
        self._compute = compute
        self._images_NHWC = torch.from_numpy(images_NHWC)
        self._labels_N = torch.from_numpy(labels_N).to(compute.device)
        self._resident = compute.device.type == "cpu"
        if compute.device.type == "cuda":
            self.num_at_once = _PIXELS_AT_ONCE // self.num_pixels
            free_bytes, _ = torch.cuda.mem_get_info(compute.device)
            self._resident = images_NHWC.nbytes < free_bytes / _DEVICE_SHARE
            if self._resident:
                self._images_NHWC = self._images_NHWC.to(compute.device)

    def take(self, indices_N: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, H, W, C) and labels int64 (N,), on the device."""
        indices = torch.from_numpy(indices_N)
        on_device = self._compute.upload(indices)
        if self._resident:
            return self._images_NHWC[on_device], self._labels_N[on_device]
        return self._compute.upload(self._images_NHWC[indices]), self._labels_N[on_device]

    def batches(
        self, wanted: Iterable[np.ndarray], epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images` says; an array's images are not cropped."""
        return map(self.take, wanted)


def agreed(batches: Iterator[Batch], world: World) -> Iterator[Batch]:
    """The batches, as long as every process has its next one; then LoadingError in all of them.

    Else the others would wait in the middle of a step for the one that ends, and nothing could be saved.
    """
    while True:
        failure = None
        try:
            batch = next(batches, None)
        except LoadingError as error:
            failure = error
        agree_on(failure, world)
        if batch is None:
            return
        yield batch


def agree_on(failure: LoadingError | None, world: World) -> None:
    """Raise LoadingError in all processes, if one of them has a failure."""
    (is_lacking,) = world.any(failure is not None)
    if is_lacking:
        raise failure or LoadingError("another process of this training lacks its next images")

"""Mini-batches as tensors on the device, from arrays: no DataLoader, no worker processes.

The arrays are memory-mapped, so the system keeps in memory what fits. On CUDA, images that fit into a third
of the free device memory are copied there once. N: images of a batch, H, W, C: height, width, channels.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sdpipe.data.augment import Normalisation, shift_and_flip
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws

_DEVICE_SHARE = 3  # the images take at most 1/3 of the device's free memory


class Images:
    """Stored images and labels, from which any are brought to the device by number."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, compute: Compute) -> None:
        self._compute = compute
        self._images_NHWC = torch.from_numpy(images_NHWC)
        self._labels_N = torch.from_numpy(labels_N).to(compute.device)
        self._resident = compute.device.type == "cpu"
        if compute.device.type == "cuda":
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


class Batches:
    """The augmented mini-batches of a training, any of them at any time."""

    def __init__(
        self,
        config: TrainConfig,
        images: Images,
        train_indices: np.ndarray,
        normalise: Normalisation,
        compute: Compute,
    ) -> None:
        """train_indices: numbers of the training part; normalise: on the device."""
        self._config = config
        self._images = images
        self._train_indices = train_indices
        self._normalise = normalise
        self._compute = compute
        self._draws = Draws(config.seed)

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """The numbers of a mini-batch's images, int64 (N,).

        Images that do not fill the epoch's last mini-batch are left out; each epoch others.
        """
        size = self._config.batch_size
        order = self._draws.order(epoch, len(self._train_indices))
        return np.asarray(self._train_indices[order[step * size : (step + 1) * size]])

    def epoch(
        self, epoch: int, steps: range, parts: Sequence[slice]
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """These mini-batches, each as its parts: images (N, C, H, W), labels (N,)."""
        config, num = self._config, len(self._train_indices)
        order = self._draws.order(epoch, num)
        shifts_N2 = torch.from_numpy(self._draws.shifts(epoch, num, config.shift_px))
        flips_N = torch.from_numpy(self._draws.flips(epoch, num) if config.flip else np.zeros(num, bool))
        for step in steps:
            batch = order[step * config.batch_size : (step + 1) * config.batch_size]
            yield [self._part(batch[part], shifts_N2, flips_N) for part in parts]

    def _part(self, samples: np.ndarray, shifts_N2: Tensor, flips_N: Tensor) -> tuple[Tensor, Tensor]:
        images_NHWC, labels_N = self._images.take(self._train_indices[samples])
        images_NHWC = self._normalise(images_NHWC)
        if self._config.shift_px or self._config.flip:
            shifts, flips = (self._compute.upload(draw[samples]) for draw in (shifts_N2, flips_N))
            images_NHWC = shift_and_flip(images_NHWC, shifts, flips, self._config.shift_px)
        return images_NHWC.permute(0, 3, 1, 2), labels_N

"""Mini-batches as augmented tensors on the device. N: images of a batch, H, W, C: height, width, channels."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sdpipe.data.augment import Normalisation, jitter_colours, light, shifted_pixels, take_pixels
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws
from sdpipe.training.images import Images


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
        order, draws = self._draws.order(epoch, num), self._draw(epoch, num)
        batches = (order[step * config.batch_size : (step + 1) * config.batch_size] for step in steps)
        samples = [batch[part] for batch in batches for part in parts]
        at_once = self._num_at_once(parts[0].stop - parts[0].start)
        groups = [samples[at : at + at_once] for at in range(0, len(samples), at_once)]
        ready = self._ready(groups, epoch, draws)
        for _ in steps:
            yield list(islice(ready, len(parts)))

    def _num_at_once(self, part_size: int) -> int:
        """Parts that are augmented together; the same bytes as one by one, also where an epoch goes on."""
        if self._config.colour_jitter or self._config.lighting:
            return 1  # sums, which a GPU may round in another order for another number of images
        return max(1, self._images.num_at_once // part_size)

    def _ready(
        self, groups: Sequence[Sequence[np.ndarray]], epoch: int, draws: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of each array of samples; those of a group are augmented together."""
        joined = [np.concatenate(group) for group in groups]
        loaded = self._images.batches((self._train_indices[each] for each in joined), epoch)
        for group, each, (images_NHWC, labels_N) in zip(groups, joined, loaded, strict=True):
            images_NCHW = self._augment(images_NHWC, each, draws)
            sizes = [len(samples) for samples in group]
            parts = zip(torch.split(images_NCHW, sizes), torch.split(labels_N, sizes), strict=True)
            # A copy lies in memory as a part by itself does; kernels may be chosen by the alignment.
            yield from parts if len(group) == 1 else ((images.clone(), labels) for images, labels in parts)

    def _draw(self, epoch: int, num: int) -> dict[str, Tensor]:
        """What augmentation needs of each sample's draws."""
        config, drawn = self._config, {}
        if config.colour_jitter:
            drawn["order"], drawn["weights"] = self._draws.jitter(epoch, num, config.colour_jitter)
        if config.lighting:
            drawn["alphas"] = self._draws.lighting(epoch, num, config.lighting)
        if config.shift_px or config.flip:
            drawn["shifts"] = self._draws.shifts(epoch, num, config.shift_px)
            drawn["flips"] = self._draws.flips(epoch, num) if config.flip else np.zeros(num, bool)
        return {name: torch.from_numpy(draw) for name, draw in drawn.items()}

    def _augment(self, images_NHWC: Tensor, samples: np.ndarray, draws: dict[str, Tensor]) -> Tensor:
        drawn = {name: draw[samples] for name, draw in draws.items()}
        upload, max_shift_px = self._compute.upload, self._config.shift_px
        if "order" in drawn:
            order_N3, weights_N3 = upload(drawn["order"]), upload(drawn["weights"])
            images_NHWC = jitter_colours(images_NHWC.float(), order_N3, weights_N3)
        if "alphas" in drawn:
            images_NHWC = light(images_NHWC.float(), upload(drawn["alphas"]))
        images_NHWC = self._normalise(images_NHWC)
        if "shifts" in drawn:
            size_HW = images_NHWC.shape[1], images_NHWC.shape[2]
            # On the host: to a GPU each of these small steps would be a kernel.
            pixels_NP = shifted_pixels(drawn["shifts"], drawn["flips"], size_HW, max_shift_px)
            images_NHWC = take_pixels(images_NHWC, upload(pixels_NP), max_shift_px)
        return images_NHWC.permute(0, 3, 1, 2)

"""A training script as people write it: DataLoader, PIL images, torchvision transforms, fp32, NCHW.

Two things are not its own. Choosing sdpipe's compute on CUDA has turned TF32 on for matrix products in the
whole process, which only makes it faster; deterministic algorithms, which that chooses, too, are off in its
turns. And its worker processes rest while others have their turn: they would take cores from them, and have
batches ready at the next turn that cost it nothing.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.synchronize import Event

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.settings import IMAGE_SIZE, NUM_CHANNELS, NUM_CLASSES
from benchmarks.timing import seconds
from sdpipe.network import ResNet, initialise
from sdpipe.training.config import TrainConfig

_REST_S = 600.0  # the longest rest of a worker; one whose script was killed then notices it and ends


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Augmented images and labels, as torchvision's CIFAR10 hands them out."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, shift_px: int, works: Event) -> None:
        self._images_NHWC = images_NHWC
        self._labels = labels_N.tolist()
        self._works = works
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(IMAGE_SIZE, padding=shift_px),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * NUM_CHANNELS, (0.5,) * NUM_CHANNELS),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self._works.wait(_REST_S)
        image: Tensor = self._transform(Image.fromarray(self._images_NHWC[index]))
        return image, self._labels[index]


class PlainScript:
    """Its training at constant depth, which goes on for as many turns as one likes. Close it in the end."""

    def __init__(
        self,
        config: TrainConfig,
        images_NHWC: np.ndarray,
        labels_N: np.ndarray,
        device: torch.device,
        workers: int,
    ) -> None:
        """images_NHWC: uint8, in memory."""
        self._works = multiprocessing.Event()
        self._loader = DataLoader(
            _Pictures(images_NHWC, labels_N, config.shift_px, self._works),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        network = ResNet(config.network_config(in_channels=NUM_CHANNELS, num_classes=NUM_CLASSES))
        initialise(network, config.seed)
        self._network = network.to(device).train()
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=True,
        )
        self._every_block = [True] * network.config.num_blocks
        self._device = device
        self._steps = self._train()

    def turn(self, num_steps: int) -> float:
        """Take so many steps; seconds. A new epoch's worker processes are started where one begins."""
        self._works.set()
        with torch.backends.cudnn.flags(enabled=True, deterministic=False, benchmark=False):  # the defaults
            taken_s = seconds(lambda: self._take(num_steps), self._device)
        self._works.clear()
        return taken_s

    def close(self) -> None:
        """End the worker processes."""
        self._works.set()
        self._steps.close()  # type: ignore[attr-defined]

    def _take(self, num_steps: int) -> None:
        for _ in range(num_steps):
            next(self._steps)

    def _train(self) -> Iterator[float]:
        while True:
            running_loss = 0.0
            for images_NCHW, labels_N in self._loader:
                images_NCHW = images_NCHW.to(self._device, non_blocking=True)
                labels_N = labels_N.to(self._device, non_blocking=True)
                self._optimizer.zero_grad()
                loss = F.cross_entropy(self._network(images_NCHW, self._every_block), labels_N)
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizer.step()
                running_loss += loss.item()
                yield running_loss

"""The bare step: sdpipe's training step on one mini-batch that already is in the device's memory."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from benchmarks.settings import NUM_CHANNELS, NUM_CLASSES
from sdpipe.errors import TrainingError
from sdpipe.network import ResidualBlock, ResNet, initialise
from sdpipe.segment import Active
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws
from sdpipe.training.step import PartDraws, TrainingStep
from sdpipe.training.world import World

ALONE = World(0, 1, 0)


class BareStep:
    """A network in training that sees the same mini-batch again and again."""

    def __init__(
        self,
        config: TrainConfig,
        compute: Compute,
        batch: tuple[Tensor, Tensor],
        behind_branch: Callable[[float], nn.Module] | None = None,
        num_classes: int = NUM_CLASSES,
    ) -> None:
        """batch: images (N, C, H, W), channels last, and labels (N,), on the device.

        behind_branch: makes what is put behind each branch, from 1 - p_l, the probability of dropping it.
        """
        network = ResNet(config.network_config(in_channels=NUM_CHANNELS, num_classes=num_classes))
        initialise(network, config.seed)
        if behind_branch is not None:
            for block in network.blocks:
                assert isinstance(block, ResidualBlock)
                block.branch = nn.Sequential(block.branch, behind_branch(1 - block.survival_prob))
        compute.place(network)
        self._step = TrainingStep(config, network, compute, ALONE)
        images_NCHW, labels_N = batch
        self._parts = [(images_NCHW[part], labels_N[part]) for part in self._step.parts]
        self._config = config
        self._number = 0

    def take(self, active: Sequence[Active]) -> None:
        """Forward, backward and update with these blocks active, then clear the gradients.

        Raises TrainingError if the loss is not finite: such a step is left out, so its time says nothing.
        """
        keys_LN = self._dropout_keys(len(active))

        def draw(part: int) -> PartDraws:
            of_part = None if keys_LN is None else keys_LN[:, self._step.all_parts[part]]
            return PartDraws(active=active, dropout_keys_LN=of_part)

        loss = self._step.run(self._number, self._parts, draw, self._config.learning_rate)
        if loss is None:
            raise TrainingError(f"benchmark step {self._number + 1}: the loss or a gradient is not finite")
        self._step.clear_gradients()
        self._number += 1

    def _dropout_keys(self, num_blocks: int) -> np.ndarray | None:
        """Drawn as in a training, of all parts; None where there is no dropout."""
        if not self._config.dropout:
            return None
        draws = Draws(self._config.seed)
        return draws.dropout_keys(0, self._number, num_blocks, self._config.batch_size)

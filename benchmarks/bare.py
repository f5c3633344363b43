"""The bare step: sdpipe's training step on one mini-batch that already is in the device's memory."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from benchmarks.settings import NUM_CHANNELS, NUM_CLASSES
from sdpipe.errors import TrainingError
from sdpipe.network import ResidualBlock, ResNet, initialise
from sdpipe.segment import Active
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
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
        self._learning_rate = config.learning_rate
        self._number = 0

    def take(self, active: Sequence[Active]) -> None:
        """Forward, backward and update with these blocks active, then clear the gradients.

        Raises TrainingError if the loss is not finite: such a step is left out, so its time says nothing.
        """
        draws = PartDraws(active=active)
        loss = self._step.run(self._number, self._parts, lambda *_part: draws, self._learning_rate)
        if loss is None:
            raise TrainingError(f"benchmark step {self._number + 1}: the loss or a gradient is not finite")
        self._step.clear_gradients()
        self._number += 1

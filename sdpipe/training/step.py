"""One training step: forward, backward and update of the active blocks, the paper's update.

Nothing here waits for the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sdpipe.dropout import Dropout
from sdpipe.errors import ConfigError
from sdpipe.network import ResidualBlock, ResNet, join_rows
from sdpipe.segment import Active, Segment
from sdpipe.training.compiling import compile_branches
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.graphs import launch_blocks_as_graphs
from sdpipe.training.guard import FP16_STREAK, Guard
from sdpipe.training.recompute import recompute_branches
from sdpipe.training.sgd import FusedSGD
from sdpipe.training.world import World

_NEVER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class PartDraws:
    """What is drawn for one part of a mini-batch: which blocks are active, and dropout's keys."""

    active: Sequence[Active]
    dropout_keys_LN: np.ndarray | None = None  # int32; None where there is no dropout


class TrainingStep:
    """The optimizer of a network, with what it remembers from step to step."""

    def __init__(self, config: TrainConfig, network: ResNet, compute: Compute, world: World) -> None:
        """network: on the device. Raises ConfigError if a mini-batch has too few images for its parts."""
        self.network = network
        # Noted once: to walk through the modules of a deep network takes milliseconds.
        self._stem_statistics = _floating_buffers(network.stem)
        self._block_statistics = [_statistics_of(block) for block in network.blocks]
        self._dropouts = [module for module in network.modules() if isinstance(module, Dropout)]
        self._compute = compute
        self._world = world
        self._batch_size = config.batch_size
        # As many parts as the config asks for, or more, so that all processes have the same number.
        self._num_parts = math.lcm(config.micro_batches, world.size)
        if config.batch_size // self._num_parts < config.min_part:
            raise ConfigError(
                f"params.yaml: train.batch_size: {config.batch_size} images are too few for "
                f"{self._num_parts} parts of at least {config.min_part} "
                f"(train.micro_batches {config.micro_batches}, {world.size} processes)"
            )
        self.optimizer = FusedSGD(
            list(network.parameters()), momentum=config.momentum, weight_decay=config.weight_decay
        )
        is_fp16 = compute.precision == "fp16"
        # On CUDA the scaler also leaves out, on the device, an update whose gradient is not finite.
        self.scaler = torch.amp.GradScaler(
            compute.device.type,
            enabled=is_fp16 or compute.device.type == "cuda",
            init_scale=2.0**16 if is_fp16 else 1.0,
            growth_interval=2000 if is_fp16 else _NEVER,
        )
        self.guard = Guard(compute.device, FP16_STREAK if is_fp16 else 0)
        if config.compile:
            compile_branches(network, is_dynamic=config.draw == "sample")
        if config.recompute:
            recompute_branches(network)
        self._view = world.replicate(network)
        # What is in a graph is always the same: no mask is drawn in it, no segment taken, no message sent.
        self._lacks_graphs = compute.device.type == "cuda" and not (
            config.compile or config.recompute or config.dropout or config.draw == "sample" or world.size > 1
        )
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self._statistics_momentum = norms[0].momentum or 0.0
        if len(self.parts) > 1:
            for norm in norms:
                norm.momentum = 1.0  # a part leaves its own statistics; `run` takes their mean

    @property
    def all_parts(self) -> list[slice]:
        """The parts of a mini-batch, of all processes. BatchNorm normalises within a part."""
        bounds = [at * self._batch_size // self._num_parts for at in range(self._num_parts + 1)]
        return [slice(start, end) for start, end in pairwise(bounds)]

    @property
    def parts(self) -> list[slice]:
        """Those that this process computes."""
        return self.all_parts[self._world.share(self._num_parts)]

    def run(
        self,
        number: int,
        parts: Sequence[tuple[Tensor, Tensor]],
        draw: Callable[[int], PartDraws],
        learning_rate: float,
    ) -> Tensor | None:
        """Train on the parts of one mini-batch: images (N, C, H, W) and labels (N,).

        number: of the step, for the guard. draw: what is drawn for a part, given its place in `all_parts`.
        Returns the mini-batch's mean loss, a scalar on the device; or None, without an update, if the guard
        knows of a loss or gradient that is not finite.
        """
        if not self.network.training:
            self.network.train()
        if self._lacks_graphs:
            launch_blocks_as_graphs(self.network, parts[0][0], self._compute)
            self._lacks_graphs = False
        loss = torch.zeros((), device=self._compute.device)
        first = self._world.share(self._num_parts).start
        drawn = [draw(first + at) for at in range(len(parts))]
        # A block is active in all parts, each time for whichever images, or in none.
        statistics = self._statistics(drawn[0].active)
        is_cut, momentum = len(parts) > 1, self._statistics_momentum
        mixed = torch._foreach_mul(statistics, 1 - momentum) if is_cut else ()
        for at, (images_NCHW, labels_N) in enumerate(parts):
            self._set_masks(drawn[at])
            weight = len(labels_N) * self._world.size / self._batch_size  # DDP divides by the size again
            with self._world.keeping_gradients(self._view, wanted=at < len(parts) - 1):
                with self._compute.autocast():
                    part_loss = F.cross_entropy(self._view(images_NCHW, drawn[at].active), labels_N) * weight
                torch.autograd.backward(self.scaler.scale(part_loss))
            loss += part_loss.detach()
            if is_cut:
                torch._foreach_add_(mixed, statistics, alpha=momentum / len(parts))
        if is_cut:  # (1 - a) old + a (mean over the parts)
            torch._foreach_copy_(statistics, mixed)
        self._world.average_([loss, *statistics])
        self.scaler.unscale_(self.optimizer)  # type: ignore[arg-type]
        self.guard.watch(number, loss, get_total_norm(self.gradients))
        if self.guard.bad_step():
            return None
        self.scaler.step(self.optimizer, learning_rate)  # type: ignore[arg-type]
        self.scaler.update()
        return loss

    def clear_gradients(self) -> None:
        """Set gradients to 0 for the next step; until then they may be looked at."""
        self.optimizer.clear_gradients()

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient of each parameter, of all blocks."""
        return self.optimizer.gradients

    def momentum(self) -> dict[str, Tensor]:
        """The momentum buffers by parameter name."""
        names = [name for name, _ in self.network.named_parameters()]
        return dict(zip(names, self.optimizer.momentum_buffers, strict=True))

    def _set_masks(self, drawn: PartDraws) -> None:
        """Tell each block's dropout the keys of the images that its branch will see."""
        if drawn.dropout_keys_LN is None:
            return
        keys_LN = self._compute.upload(torch.from_numpy(drawn.dropout_keys_LN))
        for dropout, keys_N, active in zip(self._dropouts, keys_LN, drawn.active, strict=True):
            dropout.keys_N = keys_N
            if isinstance(active, Segment):
                sizes, are_active = active.cut(len(keys_N))
                dropout.keys_N = join_rows(torch.split(keys_N, sizes), are_active)

    def _statistics(self, active: Sequence[Active]) -> list[Tensor]:
        """Running means and variances that a step with these blocks active changes."""
        changed = list(self._stem_statistics)
        for (of_branch, of_projection), is_active in zip(self._block_statistics, active, strict=True):
            changed += of_branch if is_active else []
            changed += of_projection
        return changed


def _statistics_of(block: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Running means and variances of a block's branch, and of its projection."""
    assert isinstance(block, ResidualBlock)
    return _floating_buffers(block.branch), _floating_buffers(block.projection)


def _floating_buffers(module: nn.Module | None) -> list[Tensor]:
    buffers = () if module is None else module.buffers()
    return [buffer for buffer in buffers if torch.is_floating_point(buffer)]

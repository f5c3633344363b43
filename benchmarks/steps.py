"""The step table: what skipping inactive branches saves, next to layers that compute and then drop them."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from benchmarks.bare import BareStep
from benchmarks.cost import multiply_adds
from benchmarks.settings import IMAGE_SIZE, NUM_CHANNELS, NUM_CLASSES, Settings, train_config
from benchmarks.timing import ratio, seconds, spread, take_turns
from sdpipe.network import NetworkConfig
from sdpipe.runtime.turns import Turn
from sdpipe.segment import Active
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws

REFERENCE = "constant"
DROPPED_AFTERWARDS: dict[str, Callable[[float], nn.Module]] = {
    "torchvision": lambda drop_prob: StochasticDepth(drop_prob, mode="batch"),
    "timm": lambda drop_prob: DropPath(drop_prob),  # drawn for each sample
}


_GROUP = "group "  # names of the turns with one group active, 1, 2, 3, or none: 0


def _group_numbers(network: NetworkConfig) -> list[int]:
    """The group of each block, from 1."""
    return [int(group) for group in 1 + np.cumsum([shape.stride == 2 for shape in network.block_shapes])]


def _one_group_each(network: NetworkConfig) -> dict[str, list[bool]]:
    numbers = _group_numbers(network)
    return {f"{_GROUP}{group}": [number == group for number in numbers] for group in range(numbers[-1] + 1)}


def _alone_s(network: NetworkConfig, taken_s: dict[str, np.ndarray]) -> list[float]:
    """Median seconds of a step without any branch, then of what each group's branches add to it."""
    medians_s = [float(np.median(taken_s[name])) for name in _one_group_each(network)]
    return [medians_s[0], *(group_s - medians_s[0] for group_s in medians_s[1:])]


def _time_shares(network: NetworkConfig, counted: list[list[bool]], alone_s: list[float]) -> np.ndarray:
    """For each counted round the time that its active blocks should take, over the time of all."""
    numbers = np.array(_group_numbers(network))
    block_s = np.array([alone_s[number] / np.count_nonzero(numbers == number) for number in numbers])
    return np.asarray((alone_s[0] + np.array(counted) @ block_s) / sum(alone_s))


class _Drawing:
    """Draws each step's active blocks and remembers them."""

    def __init__(self, config: TrainConfig) -> None:
        self.network = config.network_config(in_channels=NUM_CHANNELS, num_classes=NUM_CLASSES)
        self.drawn: list[list[bool]] = []
        self._draws = Draws(config.seed)

    def draw(self) -> list[bool]:
        """b_1..b_L of the next step."""
        active = self._draws.active_blocks(0, len(self.drawn), self.network.survival_probs)
        self.drawn.append(active)
        return active


def measure_steps(settings: Settings, compute: Compute) -> dict[str, Any]:
    """Full training steps by turns, with ratios to constant depth; see `Settings`."""
    config = train_config(depth=settings.depth, batch_size=settings.batch_size, p_L=settings.p_L)
    constant = config.model_copy(update={"p_L": 1.0})
    batch = _random_batch(config, compute.device)
    torch.manual_seed(config.seed)  # of the dropping layers
    drawing = _Drawing(config)
    every_block = [True] * drawing.network.num_blocks

    def turn(step: BareStep, draw: Callable[[], Sequence[Active]]) -> Turn:
        return lambda: seconds(lambda: step.take(draw()), compute.device)

    segments = _segments(config, drawing.network.survival_probs)
    turns = {
        "stochastic": turn(BareStep(config, compute, batch), drawing.draw),
        "sample": turn(BareStep(config, compute, batch), segments),
        REFERENCE: turn(BareStep(constant, compute, batch), lambda: every_block),
    }
    for name, layer in DROPPED_AFTERWARDS.items():
        turns[name] = turn(BareStep(config, compute, batch, layer), lambda: every_block)
    alone = BareStep(constant, compute, batch)
    for name, active in _one_group_each(drawing.network).items():
        turns[name] = turn(alone, partial(list, active))
    taken_s = take_turns(turns, rounds=settings.steps, warmup=settings.warmup, label="steps")
    return {
        "rows": {
            name: {"step_s": spread(times_s), "ratio": ratio(times_s, taken_s[REFERENCE])}
            for name, times_s in taken_s.items()
            if not name.startswith(_GROUP)
        },
        "active": _active(drawing, settings.warmup, taken_s),
    }


def _segments(config: TrainConfig, probs: tuple[float, ...]) -> Callable[[], list[Active]]:
    """Draws each step's active images of each block."""
    draws, steps = Draws(config.seed), count()
    return lambda: draws.segments(0, next(steps), 0, probs, config.batch_size)


def _random_batch(config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, IMAGE_SIZE, IMAGE_SIZE, NUM_CHANNELS)
    images_NHWC = torch.randn(shape, generator=generator).to(device)
    labels_N = torch.randint(NUM_CLASSES, (config.batch_size,), generator=generator).to(device)
    return images_NHWC.permute(0, 3, 1, 2), labels_N


def _active(drawing: _Drawing, warmup: int, taken_s: dict[str, np.ndarray]) -> dict[str, Any]:
    """The blocks that were active in the counted rounds, and the time in units of their computation.

    Counted in multiply-adds, and in the time that each group's blocks take when they alone are active.
    """
    costs = multiply_adds(drawing.network, IMAGE_SIZE, IMAGE_SIZE)
    counted = drawing.drawn[warmup:]
    shares = np.array([costs.active_share(active) for active in counted])
    alone_s = _alone_s(drawing.network, taken_s)
    time_shares = _time_shares(drawing.network, counted, alone_s)
    return {
        "num_blocks": drawing.network.num_blocks,
        "mean_blocks": float(np.mean([sum(active) for active in counted])),
        "mean_share": float(shares.mean()),
        "ratio_to_share": ratio(taken_s["stochastic"], shares * taken_s[REFERENCE]),
        "no_branch_s": alone_s[0],
        "groups_s": {str(group): alone_s[group] for group in range(1, len(alone_s))},
        "mean_time_share": float(time_shares.mean()),
        "ratio_to_time_share": ratio(taken_s["stochastic"], time_shares * taken_s[REFERENCE]),
    }

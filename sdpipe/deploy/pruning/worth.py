"""The worth of each block for what it costs: how much likelihood the test network loses without it.

N: images, C: channels, H, W: height, width, K: classes, L: blocks, l = 1..L.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdpipe.data.augment import Normalisation
from sdpipe.deploy.confidence import error_fraction, fit_temperature, negative_log_likelihood
from sdpipe.deploy.pruning.recalibrate import LabelledImages, folded_network, normalised_batches
from sdpipe.network import ResidualBlock, ResNet
from sdpipe.training.weights import Weights

# A number that a convolution writes takes about as long as so many multiplications. From blocks of 16, 32 and
# 64 channels, whose multiplications are as many and whose numbers are as 4 : 2 : 1; they took 4.0, 3.0 and
# 2.5 ms at batch 64 (onnxruntime 1.31.1, one thread of an AMD EPYC, CIFAR-10's size, 2026-11-25).
_MULTIPLICATIONS_PER_NUMBER = 128


@dataclass(frozen=True, kw_only=True)
class BlockWorth:
    """What removing one block does when those in front of it are gone already; a row of order.csv."""

    ell: int  # the block, l = 1..L
    nll: float  # without it, in nats, at the whole network's temperature
    nll_rise: float  # over what it was with it
    error: float  # fraction, without it
    cost: float  # its share of the time of all branches


def order_blocks(weights: Weights, held: LabelledImages, num_candidates: int) -> list[BlockWorth]:
    """The blocks in the order in which they are to be removed.

    Greedy: again and again the block of least worth, nll_rise over cost, goes. All are measured at first;
    after each removal those `num_candidates` again that were the least worthy when last measured, since the
    worth of a block rises as its neighbours go. Equals go in the order of the network.
    """
    network = folded_network(weights).network
    costs_L = block_costs(weights)
    active_L = [True] * len(costs_L)
    whole_NK = logits_without(network, weights.normalisation, active_L, [None], held.images_NHWC)[0]
    temperature = fit_temperature(whole_NK, held.labels_N)
    nll = negative_log_likelihood(whole_NK, held.labels_N, temperature)
    last: dict[int, float] = dict.fromkeys(range(1, len(costs_L) + 1), 0.0)
    candidates, order = list(last), list[BlockWorth]()
    with _progress(len(costs_L), num_candidates, len(held.labels_N)) as bar:
        while last:
            measured = []
            found = logits_without(
                network, weights.normalisation, active_L, candidates, held.images_NHWC, bar.update
            )
            for ell, logits_NK in zip(candidates, found, strict=True):
                without = negative_log_likelihood(logits_NK, held.labels_N, temperature)
                error = error_fraction(logits_NK, held.labels_N)
                cost = costs_L[ell - 1]
                measured.append(
                    BlockWorth(ell=ell, nll=without, nll_rise=without - nll, error=error, cost=cost)
                )
                last[ell] = (without - nll) / cost
            order.append(min(measured, key=lambda worth: worth.nll_rise / worth.cost))
            nll = order[-1].nll
            active_L[order[-1].ell - 1] = False
            del last[order[-1].ell]
            candidates = sorted(sorted(last, key=lambda ell: last[ell])[:num_candidates])
    return order


def _progress(num_blocks: int, num_candidates: int, num_images: int) -> "tqdm[Any]":
    """Of images that are shown to a network without a block; of 1202 layers this takes hours."""
    num_measured = num_blocks + sum(min(num_candidates, left) for left in range(1, num_blocks))
    total = num_measured * num_images
    return tqdm(total=total, desc="order of the blocks", unit="image", unit_scale=True, disable=None)


@torch.inference_mode()
def logits_without(
    network: ResNet,
    normalisation: Normalisation,
    active: Sequence[bool],
    candidates: Sequence[int | None],
    images_NHWC: np.ndarray,
    on_measured: Callable[[int], object] = lambda _num_images: None,
) -> list[np.ndarray]:
    """Logits, float32 (N, K), of a folded network without each candidate (l = 1..L); None: with all.

    active: b_1..b_L of the blocks that are there. What stands before block l is computed once for all, so
    that all blocks cost half of L forward passes. on_measured: called with the number of images that a
    network without one block has seen.
    """
    found: dict[int | None, list[np.ndarray]] = {ell: [] for ell in candidates}
    for batch_NCHW in normalised_batches(images_NHWC, normalisation):
        hidden_NCHW = network.stem(batch_NCHW)
        for ell, block in enumerate(network.blocks, start=1):
            if ell in found:
                found[ell].append(_rest(network, block(hidden_NCHW, False), active, ell))
                on_measured(len(batch_NCHW))
            hidden_NCHW = block(hidden_NCHW, active[ell - 1])
        if None in found:
            found[None].append(_rest(network, hidden_NCHW, active, len(network.blocks)))
    return [np.concatenate(found[ell]) for ell in candidates]


def _rest(network: ResNet, hidden_NCHW: Tensor, active: Sequence[bool], ell: int) -> np.ndarray:
    """Logits (N, K) of what left block l."""
    for block, is_active in zip(network.blocks[ell:], active[ell:], strict=True):
        hidden_NCHW = block(hidden_NCHW, is_active)
    logits_NK: np.ndarray = network.head(hidden_NCHW.mean(dim=(2, 3))).numpy()
    return logits_NK


def block_costs(weights: Weights) -> list[float]:
    """Each branch's share of the time of all: its multiplications, and the numbers that it writes."""
    network = ResNet(weights.info.network)
    height, width = weights.info.image_size
    with torch.inference_mode():
        blank = torch.zeros(1, weights.info.network.in_channels, height, width)
        height, width = network.eval().stem(blank).shape[2:]
    costs = []
    for block in network.blocks:
        assert isinstance(block, ResidualBlock)
        cost = 0
        for layer in block.branch:
            if isinstance(layer, nn.Conv2d):
                height, width = math.ceil(height / layer.stride[0]), math.ceil(width / layer.stride[1])
                numbers = layer.out_channels * height * width
                cost += numbers * (layer.weight[0].numel() + _MULTIPLICATIONS_PER_NUMBER)
        costs.append(cost)
    return [cost / sum(costs) for cost in costs]

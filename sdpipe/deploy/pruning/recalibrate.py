"""Re-calibrate a network that has lost blocks: scales, BatchNorm's statistics, temperature.

The test network of eq. (5) scales branch l by p_l, the share of training steps in which the next block saw
it. A network that lacks blocks for good is closer to one drawn sub-network, whose branches are not scaled
(eq. 2): the best scale lies between p_l and 1, and one number t says where for all kept blocks,
s_l = p_l + t (1 - p_l). What BatchNorm measured while blocks came and went no longer holds either, and is
measured again on training images. N: images, K: classes.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from sdpipe.data.augment import Normalisation
from sdpipe.deploy.confidence import error_fraction, fit_temperature, negative_log_likelihood
from sdpipe.deploy.fold import TestNetwork, fold
from sdpipe.network import ResidualBlock, ResNet
from sdpipe.training.weights import Weights

_BATCH = 250  # images of a forward pass; only memory and speed depend on it


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImages:
    """Images, uint8 (N, H, W, C), and their classes."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a network is on some images."""

    error: float
    nll: float  # mean negative log-likelihood at this temperature, in nats
    temperature: float  # its best, or 1 where no image is wrong

    @property
    def rank(self) -> tuple[bool, float]:
        """The best network has the lowest: by likelihood, each at its best temperature.

        Where no image is wrong that comes to 0 as T falls to 0; of such networks, which go before all others,
        the likelihood at T = 1 decides.
        """
        return self.error > 0, self.nll


@dataclass(frozen=True, kw_only=True, eq=False)
class Recalibrated:
    """A network without some blocks, and how its scales were found."""

    weights: Weights
    t: float
    curve: tuple[tuple[float, Score], ...]  # each t that was tried


def interpolated_scales(
    survival_probs: Sequence[float], kept: Collection[int], t: float
) -> tuple[float, ...]:
    """s_l = p_l + t (1 - p_l) of the kept blocks (l = 1..L), 0 of the others."""
    return tuple(
        prob + t * (1 - prob) if ell in kept else 0.0 for ell, prob in enumerate(survival_probs, start=1)
    )


def recalibrate(
    weights: Weights,
    kept: Collection[int],
    *,
    scale_steps: Sequence[float],
    statistics_batches: Sequence[np.ndarray],
    chosen_on: LabelledImages,
) -> Recalibrated:
    """The network of the kept blocks (l = 1..L) with the best t, and statistics that belong to it.

    statistics_batches: training images, uint8 (N, H, W, C) each. The best t has the lowest negative
    log-likelihood on `chosen_on`, the first of equals. With p_l = 1 everywhere there is nothing to search.
    """
    tried: dict[tuple[float, ...], tuple[float, Weights, Score]] = {}
    for t in scale_steps:
        scales = interpolated_scales(weights.info.network.survival_probs, kept, t)
        if scales not in tried:
            candidate = with_statistics(
                replace(weights, info=replace(weights.info, scales=scales)), statistics_batches
            )
            tried[scales] = (
                t,
                candidate,
                score(network_logits(candidate, chosen_on.images_NHWC), chosen_on.labels_N),
            )
    t, best, _ = min(tried.values(), key=lambda found: found[2].rank)
    curve = tuple((t, its_score) for t, _, its_score in tried.values())
    return Recalibrated(weights=best, t=t, curve=curve)


@torch.no_grad()
def with_statistics(weights: Weights, batches: Sequence[np.ndarray]) -> Weights:
    """The same weights with BatchNorm's statistics measured anew, in the test network that they describe.

    As in training, each batch (uint8, N H W C) is normalised by its own mean and variance; the plain mean of
    these over the batches is kept. Batches should be of about one size, since all count the same. Dropout is
    off, and what a removed block's branch holds stays as it is.
    """
    network = weights.build_network().to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a cumulative average
    for block in network.blocks:
        assert isinstance(block, ResidualBlock)
        reset = [block.projection] if block.survival_prob == 0 else [block.branch, block.projection]
        _measure(reset)
    _measure([network.stem])
    for batch_NHWC in batches:
        _forward(network, _normalised(batch_NHWC, weights.normalisation))
    return replace(weights, state=network.state_dict())


def _measure(parts: Sequence[nn.Module | None]) -> None:
    """Let the BatchNorm layers of these parts begin a new average, and take it."""
    for part in parts:
        for module in part.modules() if part is not None else ():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.train()


def _forward(network: ResNet, images_NCHW: Tensor) -> None:
    """Through all blocks, without computing the branches of those that were removed."""
    hidden_NCHW = network.stem(images_NCHW)
    for block in network.blocks:
        hidden_NCHW = block(hidden_NCHW, False if block.survival_prob == 0 else None)


def equal_batches(images_NHWC: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """The images in about len / batch_size batches whose sizes differ by 1 at most, of 2 or more each."""
    num_images = len(images_NHWC)
    return np.array_split(images_NHWC, max(1, min(round(num_images / batch_size), num_images // 2)))


def folded_network(weights: Weights) -> TestNetwork:
    """The test network as it is deployed, in PyTorch: a third faster than with BatchNorm in it."""
    network: TestNetwork = fold(weights.build_network()).float().to(memory_format=torch.channels_last)
    return network


def normalised_batches(images_NHWC: np.ndarray, normalisation: Normalisation) -> Iterator[Tensor]:
    """Float32 (N, C, H, W), as the network takes them, batch after batch."""
    for start in range(0, len(images_NHWC), _BATCH):
        yield _normalised(images_NHWC[start : start + _BATCH], normalisation)


def _normalised(images_NHWC: np.ndarray, normalisation: Normalisation) -> Tensor:
    return normalisation(torch.from_numpy(images_NHWC)).permute(0, 3, 1, 2)


@torch.inference_mode()
def network_logits(weights: Weights, images_NHWC: np.ndarray) -> np.ndarray:
    """Logits, float32 (N, K), of the test network."""
    network = folded_network(weights)
    batches = normalised_batches(images_NHWC, weights.normalisation)
    return np.concatenate([network(batch_NCHW).numpy() for batch_NCHW in batches])


def score(logits_NK: np.ndarray, labels_N: np.ndarray) -> Score:
    """Error and likelihood; the temperature is fitted, so that confidence does not decide."""
    temperature = fit_temperature(logits_NK, labels_N)
    return Score(
        error=error_fraction(logits_NK, labels_N),
        nll=negative_log_likelihood(logits_NK, labels_N, temperature),
        temperature=temperature,
    )

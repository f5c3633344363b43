"""The order of the blocks against recomputation in float64 without the implementation's short cuts."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_weights
from pruned_runs import with_own_labels
from scipy.optimize import minimize_scalar
from torch import Tensor

from sdpipe.deploy.pruning.recalibrate import LabelledImages
from sdpipe.deploy.pruning.worth import block_costs, order_blocks
from sdpipe.training.weights import Weights


def exact_logits(weights: Weights, removed: Sequence[int], held: LabelledImages) -> Tensor:
    """The un-folded network in float64, all blocks at once."""
    network = weights.build_network().double()
    for ell in removed:
        network.blocks[ell - 1].survival_prob = 0.0
    normalised = weights.normalisation(torch.from_numpy(held.images_NHWC)).double().permute(0, 3, 1, 2)
    with torch.no_grad():
        logits_NK: Tensor = network(normalised)
    return logits_NK


def test_useless_blocks_go_first() -> None:
    """Blocks whose branch ends in a BatchNorm of weight and bias 0 add nothing: worth 0, all others more."""
    weights = make_weights(p_L=1.0)
    for ell in (3, 8):
        for name in ("weight", "bias"):
            weights.state[f"blocks.{ell - 1}.branch.bn2.{name}"].zero_()
    order = order_blocks(*with_own_labels(weights), 4)
    assert [worth.ell for worth in order[:2]] == [3, 8]
    assert [worth.nll_rise for worth in order[:2]] == pytest.approx([0, 0], abs=1e-6)
    assert all(worth.nll_rise > 1e-4 for worth in order[2:])
    assert sorted(worth.ell for worth in order) == list(range(1, 10))


@pytest.mark.parametrize(("num_candidates", "num_mistakes"), [(2, 0), (9, 0), (2, 6)])
def test_the_order_is_that_of_a_full_recomputation(num_candidates: int, num_mistakes: int) -> None:
    """Greedy by nll_rise over cost, each network computed as a whole, un-folded, in float64.

    All at the temperature of the whole network: 1 without a mistake, else that of the lowest likelihood.
    """
    weights, held = with_own_labels(make_weights(seed=2))
    held.labels_N[:num_mistakes] = (held.labels_N[:num_mistakes] + 1) % 3
    labels_N, temperature = torch.from_numpy(held.labels_N), 1.0

    def exact_nll(removed: Sequence[int]) -> float:
        return F.cross_entropy(exact_logits(weights, removed, held) / temperature, labels_N).item()

    if num_mistakes:
        whole_NK = exact_logits(weights, [], held)
        temperature = minimize_scalar(
            lambda tried: F.cross_entropy(whole_NK / tried, labels_N).item(),
            bounds=(0.1, 10),
            method="bounded",
        ).x
        assert abs(temperature - 1) > 0.1
    order = order_blocks(weights, held, num_candidates)
    costs, removed, last = block_costs(weights), [], dict.fromkeys(range(1, 10), 0.0)
    candidates = list(last)
    for worth in order:
        before = exact_nll(removed)
        rises = {ell: exact_nll([*removed, ell]) - before for ell in candidates}
        last |= {ell: rise / costs[ell - 1] for ell, rise in rises.items()}
        assert worth.ell == min(candidates, key=lambda ell: last[ell])
        assert worth.nll_rise == pytest.approx(rises[worth.ell], abs=1e-5)
        removed.append(worth.ell)
        del last[worth.ell]
        candidates = sorted(last, key=lambda ell: last[ell])[:num_candidates]


def test_costs_by_hand() -> None:
    """Depth 8 at 9x9, widths 4, 8, 16: numbers written are 81, 25 and 9 pixels times 2 convolutions.

    81 * 4 * (36 + 128 + 36 + 128), 25 * 8 * (36 + 128 + 72 + 128), 9 * 16 * (72 + 128 + 144 + 128).
    """
    costs = np.array([81 * 4 * 328, 25 * 8 * 364, 9 * 16 * 472])
    assert block_costs(make_weights(depth=8)) == pytest.approx((costs / costs.sum()).tolist())

import numpy as np
import pytest
import torch
from conftest import train_config
from pydantic import ValidationError

from sdpipe.network import linear_decay
from sdpipe.training.schedule import learning_rate_at, survival_probs_at


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.1), (249, 0.1), (250, 0.01), (374, 0.01), (375, 0.001), (499, 0.001)],
)
def test_cifar_schedule(epoch: int, expected: float) -> None:
    """500 epochs, 0.1, a tenth after 250 and again after 375 (paper section 4); epochs count from 0."""
    config = train_config(epochs=500, milestones=[250, 375])
    assert learning_rate_at(config, epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.01), (9, 0.01), (10, 0.1), (149, 0.1), (150, 0.01), (225, 0.001)]
)
def test_1202_layers_warm_up(epoch: int, expected: float) -> None:
    """0.01 for 10 epochs, then 0.1, a tenth at 150 and 225 of 300."""
    warmup = {"epochs": 10, "learning_rate": 0.01}
    config = train_config(epochs=300, milestones=[150, 225], warmup=warmup)
    assert learning_rate_at(config, epoch) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup_epochs", [0, 9])
def test_plateau_is_that_of_pytorch(warmup_epochs: int) -> None:
    """The drops come where torch's ReduceLROnPlateau has them; its patience is one less.

    A warm-up is before all that: neither do its errors wait, nor are they the lowest.
    """
    errors = np.random.default_rng(0).random(80).cumsum() % 1.0  # falls and rises, with long waits
    errors = np.sort(errors)[::-1] + np.tile([0, 0.02, 0.03, 0.04], 20)
    errors = np.concatenate([np.full(warmup_epochs, 0.01), errors])
    warmup = {"epochs": warmup_epochs, "learning_rate": 0.02}
    config = train_config(epochs=len(errors), milestones=[], plateau_epochs=3, warmup=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2, threshold=0, eps=0)
    rates = []
    for epoch, error in enumerate(errors):
        is_past_warmup = epoch >= warmup_epochs
        rates.append(optimizer.param_groups[0]["lr"] if is_past_warmup else 0.02)
        assert learning_rate_at(config, epoch, errors.tolist()) == pytest.approx(rates[-1], rel=1e-9)
        if is_past_warmup:
            theirs.step(error)
    assert len(set(rates[warmup_epochs:])) > 2, "the example has drops"


def test_the_rate_falls_to_zero_at_last() -> None:
    """An error of 0 cannot fall: with patience 1 each epoch but the first divides it, 400 times here."""
    config = train_config(epochs=402, milestones=[], plateau_epochs=1)
    assert learning_rate_at(config, 4, [0.0] * 4) == pytest.approx(1e-4, rel=1e-12)
    assert learning_rate_at(config, 401, [0.0] * 401) == 0


def test_plateau_and_milestones_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="expected 0 beside milestones"):
        train_config(plateau_epochs=3)


def test_p_L_warms_up_from_constant_depth() -> None:
    """p_L 0.5 over 5 epochs: 1, 0.9, 0.8, 0.7, 0.6, then 0.5; p_27 of 54 blocks is halfway to 1 (eq. 4)."""
    config = train_config(p_L=0.5, p_L_warmup_epochs=5, epochs=7)
    lasts = [survival_probs_at(config, 54, epoch)[53] for epoch in range(7)]
    assert lasts == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5])
    assert survival_probs_at(config, 54, 2)[26] == pytest.approx(0.9)
    paper = train_config(p_L=0.5)
    assert survival_probs_at(paper, 54, 0) == linear_decay(54, 0.5)

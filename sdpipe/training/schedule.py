"""The learning rate and the survival probabilities of each epoch."""

from collections.abc import Sequence
from math import inf

from sdpipe.network import SURVIVAL_RULES
from sdpipe.training.config import TrainConfig


def learning_rate_at(config: TrainConfig, epoch: int, errors: Sequence[float] = ()) -> float:
    """The learning rate of an epoch, counted from 0.

    errors: the validation errors at the ends of the epochs before it; needed where `plateau_epochs` is not 0.
    Warm-up first, where there is one; then `learning_rate`, divided by `drop_factor` once after each
    milestone: with milestones 250 and 375 the epochs 0..249 have 0.1, 250..374 have 0.01, the rest 0.001.
    """
    if epoch < config.warmup.epochs:
        return config.warmup.learning_rate
    drops = sum(epoch >= milestone for milestone in config.milestones)
    if config.plateau_epochs:
        drops = _num_plateaus(errors[config.warmup.epochs : epoch], config.plateau_epochs)
    rate = config.learning_rate
    for _ in range(drops):  # a power would overflow where hundreds of plateaus bring it to 0
        rate /= config.drop_factor
    return rate


def _num_plateaus(errors: Sequence[float], patience: int) -> int:
    """How often `patience` epochs in a row brought no lower error than the lowest before them."""
    lowest, waited, num = inf, 0, 0
    for error in errors:
        waited = 0 if error < lowest else waited + 1
        lowest = min(lowest, error)
        if waited == patience:
            num, waited = num + 1, 0
    return num


def survival_probs_at(config: TrainConfig, num_blocks: int, epoch: int) -> tuple[float, ...]:
    """p_1..p_L in training, in an epoch counted from 0.

    Without a warm-up these are the paper's. With one of W epochs, epoch e < W has the p_L
    1 - (e / W) (1 - p_L): the first is of constant depth. The test network always has the final ones.
    """
    warmup = config.p_L_warmup_epochs
    share = min(1.0, epoch / warmup) if warmup else 1.0
    p_L = config.p_L if share == 1 else 1 - share * (1 - config.p_L)
    return SURVIVAL_RULES[config.rule](num_blocks, p_L)

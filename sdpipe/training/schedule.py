"""The learning rate of each epoch."""

from sdpipe.training.config import TrainConfig


def learning_rate_at(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0.

    Warm-up first, where there is one; then `learning_rate`, divided by `drop_factor` once after each
    milestone: with milestones 250 and 375 the epochs 0..249 have 0.1, 250..374 have 0.01, the rest 0.001.
    """
    if epoch < config.warmup.epochs:
        return config.warmup.learning_rate
    drops = sum(epoch >= milestone for milestone in config.milestones)
    return float(config.learning_rate / config.drop_factor**drops)

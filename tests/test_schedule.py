import pytest
from conftest import train_config

from sdpipe.training.schedule import learning_rate_at


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

import numpy as np
import pytest

from sdpipe.network import linear_decay
from sdpipe.training.draws import Draws


@pytest.mark.parametrize(
    ("name", "counters", "sizes"),
    [
        ("order", (3,), (100,)),
        ("shifts", (3,), (100, 4)),
        ("flips", (3,), (100,)),
        ("crop", (3, 5), ()),
        ("jitter", (3,), (100, 0.4)),
        ("lighting", (3,), (100, 0.1)),
        ("statistics_sample", (), (100, 50)),
        ("active_blocks", (3, 5), ([0.5] * 64,)),
        ("segments", (3, 5, 2), ([0.5] * 64, 32)),
        ("dropout_keys", (3, 5), (9, 16)),
    ],
)
def test_a_draw_is_a_function_of_its_arguments(
    name: str, counters: tuple[int, ...], sizes: tuple[object, ...]
) -> None:
    """The same again in any order of asking; another seed, epoch, step, part or sample gives another draw."""
    draws = Draws(7)

    def drawn(draws: Draws, *counters: int) -> str:
        found = getattr(draws, name)(*counters, *sizes)
        return repr(found.random(100) if isinstance(found, np.random.Generator) else found)

    first = drawn(draws, *counters)
    assert drawn(Draws(8), *counters) != first
    for at, counter in enumerate(counters):
        assert drawn(draws, *counters[:at], counter + 1, *counters[at + 1 :]) != first
    assert drawn(draws, *counters) == drawn(Draws(7), *counters) == first


def test_order_is_a_permutation_and_changes_each_epoch() -> None:
    draws = Draws(0)
    assert sorted(draws.order(0, 100)) == list(range(100))
    assert not np.array_equal(draws.order(0, 100), draws.order(1, 100))


def test_active_blocks_follow_the_survival_probabilities() -> None:
    """20,000 steps: the standard error of a frequency is at most 0.0036; 5 of them are allowed."""
    probs = linear_decay(9, 0.5)
    draws = Draws(1)
    frequency = np.mean([draws.active_blocks(0, step, probs) for step in range(20_000)], axis=0)
    assert frequency == pytest.approx(np.array(probs), abs=5 * 0.0036)


def test_probability_1_is_always_active() -> None:
    assert all(all(Draws(0).active_blocks(0, step, [1.0] * 54)) for step in range(200))


def test_shifts_and_flips_cover_their_range_evenly() -> None:
    """[-4, 4] has 9 values; 90,000 draws give each 1/9 +- 0.005."""
    shifts = Draws(2).shifts(0, 45_000, 4)
    values, counts = np.unique(shifts, return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    assert counts / counts.sum() == pytest.approx(1 / 9, abs=0.005)
    assert Draws(2).flips(0, 45_000).mean() == pytest.approx(0.5, abs=0.012)


def test_segments_give_each_image_its_survival_probability() -> None:
    """4,000 steps of 32 images: the share of active ones is p_l for each image, within 5 standard errors.

    sqrt(0.25 / 4000) = 0.008; and two blocks are independent for an image: both active with p_1 p_2.
    """
    probs, num = (0.5, 0.8), 32
    active = np.zeros((4000, 2, num), dtype=bool)
    for step in range(4000):
        for block, segment in enumerate(Draws(0).segments(0, step, 0, probs, num)):
            active[step, block, (segment.start + np.arange(segment.count)) % num] = True
    for block, prob in enumerate(probs):
        assert np.abs(active[:, block].mean(axis=0) - prob).max() < 0.04
    assert abs((active[:, 0] & active[:, 1]).mean() - 0.4) < 0.02
    assert all(segment.count >= 2 for segment in Draws(0).segments(0, 0, 0, (0.001,) * 50, num))

"""Every random draw of a training, as a function of (seed, epoch, step, sample, block).

Nothing random has a state, so nothing random is saved, and any step can be repeated alone.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from sdpipe.segment import Active, Segment

_MIN_ACTIVE = 2  # images; BatchNorm has no variance of one


class _Purpose(IntEnum):
    """Keeps the streams of different draws apart."""

    ORDER = 1
    SHIFTS = 2
    FLIPS = 3
    ACTIVE_BLOCKS = 4
    DROPOUT = 5
    SEGMENTS = 6
    CROP = 7
    JITTER = 8
    LIGHTING = 9
    STATISTICS = 10


class Draws:
    """The draws of one training. Epochs, steps and samples count from 0, blocks are l = 1..L in order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _generator(self, purpose: _Purpose, *counters: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, purpose, *counters))))

    def order(self, epoch: int, num_samples: int) -> np.ndarray:
        """A permutation of the samples, int64 (N,)."""
        return self._generator(_Purpose.ORDER, epoch).permutation(num_samples)

    def shifts(self, epoch: int, num_samples: int, max_shift_px: int) -> np.ndarray:
        """For each sample (down, right) in pixels, uniform in [-max, max], int64 (N, 2)."""
        generator = self._generator(_Purpose.SHIFTS, epoch)
        return generator.integers(-max_shift_px, max_shift_px, size=(num_samples, 2), endpoint=True)

    def flips(self, epoch: int, num_samples: int) -> np.ndarray:
        """For each sample whether it is mirrored, with probability 1/2, bool (N,)."""
        return self._generator(_Purpose.FLIPS, epoch).random(num_samples) < 0.5

    def crop(self, epoch: int, sample: int) -> np.random.Generator:
        """For one sample, from which its crop is drawn once its size is known."""
        return self._generator(_Purpose.CROP, epoch, sample)

    def jitter(self, epoch: int, num_samples: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """For each sample the order of the three colour changes, int64 (N, 3), and the weights in that order,

        uniform in [1 - strength, 1 + strength], float32 (N, 3).
        """
        generator = self._generator(_Purpose.JITTER, epoch)
        order_N3 = generator.random((num_samples, 3)).argsort(axis=1)
        weights_N3 = generator.uniform(1 - strength, 1 + strength, (num_samples, 3))
        return order_N3, weights_N3.astype(np.float32)

    def lighting(self, epoch: int, num_samples: int, std: float) -> np.ndarray:
        """For each sample three normal numbers of this standard deviation, float32 (N, 3)."""
        return self._generator(_Purpose.LIGHTING, epoch).normal(0, std, (num_samples, 3)).astype(np.float32)

    def statistics_sample(self, num_samples: int, count: int) -> np.ndarray:
        """So many of the samples, or all if there are fewer; int64, sorted."""
        return np.sort(self._generator(_Purpose.STATISTICS).permutation(num_samples)[:count])

    def active_blocks(self, epoch: int, step: int, survival_probs: Sequence[float]) -> list[bool]:
        """b_1..b_L of one mini-batch, b_l ~ Bernoulli(p_l) (paper eq. 2)."""
        uniform_L = self._generator(_Purpose.ACTIVE_BLOCKS, epoch, step).random(len(survival_probs))
        return [bool(active) for active in uniform_L < np.asarray(survival_probs)]

    def segments(
        self, epoch: int, step: int, part: int, survival_probs: Sequence[float], num_samples: int
    ) -> list[Active]:
        """For each block the images of a part of a mini-batch for which it is active, at least 2.

        Their number is Binomial(N, p_l), so each image's b_l is Bernoulli(p_l), but for that least number.
        """
        generator = self._generator(_Purpose.SEGMENTS, epoch, step, part)
        counts_L = generator.binomial(num_samples, survival_probs)
        starts_L = generator.integers(num_samples, size=len(survival_probs))
        return [
            Segment(start=int(start), count=max(int(count), _MIN_ACTIVE))
            for start, count in zip(starts_L, counts_L, strict=True)
        ]

    def dropout_keys(self, epoch: int, step: int, num_blocks: int, batch_size: int) -> np.ndarray:
        """For each block and each sample of a mini-batch, in its order, the key of a mask; int32 (L, N)."""
        generator = self._generator(_Purpose.DROPOUT, epoch, step)
        return generator.integers(-(2**31), 2**31, size=(num_blocks, batch_size), dtype=np.int32)

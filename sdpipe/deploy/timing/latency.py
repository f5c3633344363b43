"""Latency of PyTorch eager and onnxruntime on the same images, side by side."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from sdpipe.runtime.turns import play_rounds, timed

_WARMUP = 2  # rounds that do not count: the first calls allocate and choose kernels


def measure_latency(
    calls: Mapping[str, Callable[[np.ndarray], Any]],
    images_NHWC: np.ndarray,
    batch_sizes: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Milliseconds a call, for each batch size and contender: median and quartiles over `repeats` calls.

    calls: each takes uint8 images (N, H, W, C); the contenders take turns. images_NHWC: what the batches are
    of, repeated where one is larger. Returns batch_<size> -> contender -> median_ms, quartile_1_ms,
    quartile_3_ms and n. Raises what a call raises.
    """
    results: dict[str, Any] = {}
    for batch_size in batch_sizes:
        batch_NHWC = images_NHWC[np.arange(batch_size) % len(images_NHWC)]  # a part on disk stays there
        turns = {name: timed(partial(call, batch_NHWC)) for name, call in calls.items()}
        rounds = list(play_rounds(turns, range(_WARMUP + repeats)))[_WARMUP:]
        results[f"batch_{batch_size}"] = {
            name: _summary([taken_s[name] * 1000 for taken_s in rounds]) for name in calls
        }
    return results


def _summary(times_ms: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(times_ms, [25, 50, 75]).tolist()
    return {"median_ms": median, "quartile_1_ms": low, "quartile_3_ms": high, "n": len(times_ms)}

"""Latency of PyTorch eager and onnxruntime on the same images, side by side."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def measure_latency(
    calls: Mapping[str, Callable[[np.ndarray], Any]],
    images_NHWC: np.ndarray,
    batch_sizes: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Milliseconds a call, for each batch size and contender: median and quartiles over `repeats` calls.

    The contenders take turns, so that a noisy moment hits all of them. The test set is repeated where a
    batch is larger than it.
    """
    results: dict[str, Any] = {}
    for batch_size in batch_sizes:
        batch_NHWC = np.resize(images_NHWC, (batch_size, *images_NHWC.shape[1:]))
        for call in calls.values():  # the first calls allocate and choose kernels
            call(batch_NHWC)
            call(batch_NHWC)
        times_ms: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                started = time.perf_counter()
                call(batch_NHWC)
                times_ms[name].append((time.perf_counter() - started) * 1000)
        results[f"batch_{batch_size}"] = {name: _summary(values) for name, values in times_ms.items()}
    return results


def _summary(times_ms: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(times_ms, [25, 50, 75]).tolist()
    return {"median_ms": median, "quartile_1_ms": low, "quartile_3_ms": high, "n": len(times_ms)}

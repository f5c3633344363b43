"""Variants take turns, so that a noisy moment hits all of them; what comes out is ratios within a round."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sdpipe.runtime.turns import Turn, play_rounds


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Wall time of some work in seconds; on CUDA with all that it has queued, and nothing from before."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(turns: Mapping[str, Turn], *, rounds: int, warmup: int, label: str) -> dict[str, np.ndarray]:
    """Seconds of each variant in each counted round, float64 (rounds,); `warmup` rounds before do not count.

    label: stands before the progress bar.
    """
    numbers = tqdm(range(warmup + rounds), desc=label, unit="round", disable=None)
    counted = list(play_rounds(turns, numbers))[warmup:]
    return {name: np.array([taken_s[name] for taken_s in counted]) for name in turns}


def spread(values: np.ndarray) -> dict[str, Any]:
    """Median and quartiles of n values."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"n": len(values), "median": median, "quartile_1": low, "quartile_3": high}


def ratio(times: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Spread of the ratios within each round, and the ratio of the sums over all rounds."""
    return {**spread(times / reference), "of_sums": float(times.sum() / reference.sum())}

"""How fast deployed files are: latency and throughput in turns, start-up and memory in fresh processes.

N: images, H, W, C: height, width, channels.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import Artifact
from sdpipe.runtime.signal_stack import kept_signal_stack
from sdpipe.runtime.turns import Turn, play_rounds, timed

WARMUP = 3  # rounds that do not count: the first calls allocate memory and choose kernels
NUM_STARTS = 3  # processes for the median start-up
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, eq=False)
class Contender:
    """One network in one engine, with its number of threads settled."""

    file: str
    engine: str  # onnxruntime, openvino or pytorch
    image_shape: tuple[int, int, int]  # H, W, C
    run: Callable[[np.ndarray], object]  # one batch of uint8 images (N, H, W, C)


def onnx_contender(artifact: Artifact) -> Contender:
    """The deployed file in onnxruntime."""
    height, width = artifact.metadata.image_size
    shape = (height, width, artifact.metadata.channels)
    return Contender(file=str(artifact.path), engine="onnxruntime", image_shape=shape, run=artifact.run)


def turn(contender: Contender, batch_size: int) -> Turn:
    """One call on random images, which are the same each time."""
    rng = np.random.default_rng(0)
    images_NHWC = rng.integers(0, 256, size=(batch_size, *contender.image_shape), dtype=np.uint8)

    return timed(lambda: contender.run(images_NHWC))


def time_contenders(
    contenders: Sequence[Contender],
    *,
    batch_size: int,
    threads: int,
    numbers: Iterable[int],
    timings: list[dict[str, Any]],
) -> None:
    """Let all take turns, and append a timing of each to `timings`.

    numbers: of the rounds, from 0; the first `WARMUP` do not count. What is finished is appended also when
    an exception, such as KeyboardInterrupt, ends the rounds.
    """
    turns = {str(at): turn(contender, batch_size) for at, contender in enumerate(contenders)}
    finished: list[dict[str, float]] = []
    try:
        with kept_signal_stack():
            for taken_s in play_rounds(turns, numbers):
                finished.append(taken_s)
    finally:
        counted = finished[WARMUP:]
        for at, contender in enumerate(contenders if counted else ()):
            times_s = np.array([taken_s[str(at)] for taken_s in counted])
            head = {"file": contender.file, "engine": contender.engine}
            cell = {"batch_size": batch_size, "threads": threads}
            timings.append({**head, **cell, **summary(times_s, batch_size)})


def summary(times_s: np.ndarray, batch_size: int) -> dict[str, Any]:
    """Percentiles of the latency of n calls in ms, interpolated, and images a second over all of them."""
    latencies = np.percentile(times_s * 1000, PERCENTILES).tolist()
    return {
        "n": len(times_s),
        **{f"p{percent}_ms": value for percent, value in zip(PERCENTILES, latencies, strict=True)},
        "images_per_s": float(batch_size * len(times_s) / times_s.sum()),
    }


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a fresh process needed."""

    seconds: float  # from its start to its first prediction
    peak_bytes: int  # of its resident memory


def start_process(path: Path | None, *, batch_size: int, device: str) -> Start:
    """Start a process that imports the runtime, opens a file and runs one batch; no file: it imports only.

    Raises ModelError if it fails.
    """
    command = [sys.executable, "-m", "sdpipe.runtime.first_prediction"]
    command += [] if path is None else [str(path), str(batch_size), device]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        taken_s = time.perf_counter() - started
        _, errors = process.communicate()
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{path}: a process that opens it fails: {last}")
    return Start(seconds=taken_s, peak_bytes=json.loads(line)["peak_bytes"])

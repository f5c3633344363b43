"""Opens and runs damaged copies of a model file, as many as asked for, and prints what came of each.

Usage: python tests/damaged_models.py MODEL FIRST_SEED COUNT. The last line is JSON: counts and peak memory.
A copy has a bit flipped, a byte replaced, a stretch cut out or doubled, or its end cut off, by its seed.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import open_artifact


def damage(raw: bytes, seed: int) -> bytes:
    """A damaged copy; half of them by one bit, which is the hardest to notice."""
    rng = np.random.default_rng(seed)
    at, changed = int(rng.integers(len(raw))), bytearray(raw)
    kind = int(rng.integers(8))
    if kind < 4:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 4:
        changed[at] = int(rng.integers(256))
    elif kind == 5:
        del changed[at : at + int(rng.integers(1, 100))]
    elif kind == 6:
        changed[at:at] = changed[at : at + int(rng.integers(1, 100))]
    else:
        del changed[at:]
    return bytes(changed)


def main(model: Path, first: int, count: int) -> None:
    """Try them."""
    raw = model.read_bytes()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for seed in range(first, first + count):
            path.write_bytes(damage(raw, seed))
            print(seed, flush=True)  # the last one named is the one that ended the process
            started = time.perf_counter()
            try:
                artifact = open_artifact(path, "cpu")
                shape = (2, *artifact.metadata.image_size, artifact.metadata.channels)
                artifact.run(np.zeros(shape, dtype=np.uint8))
                outcomes["ran"] += 1
            except ModelError as error:
                outcomes["refused" if "\n" not in str(error) else "refused in several lines"] += 1
            slowest = max(slowest, time.perf_counter() - started)
    # Not ru_maxrss, which begins with what the parent process had.
    peak_mib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print(json.dumps({**outcomes, "slowest_s": round(slowest, 3), "peak_MiB": round(peak_mib)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Three steps of the recipe cifar10-1202 in this process: `python tests/deep_steps.py BATCH P_L RECOMPUTE`.

Prints precision, peak memory in GiB and seconds of the last step, as JSON. Random pictures of CIFAR's shape.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from sdpipe.data.store import DataSet
from sdpipe.recipes import load_recipes
from sdpipe.training.compute import choose_compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.trainer import Trainer
from sdpipe.training.world import World


def main(batch_size: int, p_L: float, recompute: bool) -> None:
    train = load_recipes()["cifar10-1202"].train
    config = TrainConfig.model_validate(
        {**train, "batch_size": batch_size, "p_L": p_L, "recompute": recompute}
    )
    num = 4 * batch_size
    images = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(num, dtype=np.int64) % 10
    dataset = DataSet(
        name="noise",
        class_names=tuple("abcdefghij"),
        train_images=images,
        train_labels_N=labels,
        test_images_NHWC=images,
        test_labels_N=labels,
        train_parts=(("train", num),),
        crop_fraction=1.0,
        digest="0" * 64,
    )
    compute = choose_compute("cpu", "auto")
    trainer = Trainer(config, dataset, compute, World(0, 1, 0))
    started = time.perf_counter()
    for _, _ in zip(range(3), trainer.steps(), strict=False):
        step_s, started = time.perf_counter() - started, time.perf_counter()
    trainer.check_finite()
    # getrusage() would count what the process that started this one had in memory.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_gib = int(status["VmHWM"].split()[0]) / 2**20
    measured = {"peak_gib": round(peak_gib, 2), "step_s": round(step_s, 2)}
    print(json.dumps({"precision": compute.precision, "steps": trainer.num_steps, **measured}))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "true")

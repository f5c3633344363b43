"""`python -m benchmarks.loading`: how long a training on picture files waits for its next batch.

Random JPEG files are decoded by worker processes, as for the data set imagenet. Beside the training on this
machine's device there is a stand-in for one that leaves the processor to the workers: it sleeps.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from PIL import Image

from benchmarks.bare import ALONE
from sdpipe.config import parse_section
from sdpipe.data.config import ImageNetConfig
from sdpipe.data.fetch import fetch
from sdpipe.data.store import DataSet, open_dataset
from sdpipe.errors import errors_on_one_line
from sdpipe.files import work_folder
from sdpipe.recipes import load_recipes
from sdpipe.training.compute import choose_compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.trainer import Trainer

HEIGHT, WIDTH = 375, 500  # ImageNet's most frequent size
_PARTS = {"train": 1.0, "val": 0.1}


def make_dataset(folder: Path, num_train: int) -> DataSet:
    """JPEG files of smooth random colours in three classes, listed as the stage fetch does it."""
    rng = np.random.default_rng(0)
    for part, share in _PARTS.items():
        for at in range(max(3, int(num_train * share))):
            coarse = rng.integers(0, 256, size=(HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
            path = folder / "pictures" / part / str(at % 3) / f"{at}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(path, quality=90)
    source = str((folder / "pictures").resolve())
    fetch("imagenet", ImageNetConfig(source=source, image_size=224, resize=256), folder / "data", folder)
    return open_dataset(folder / "data")


def waits(batches: Iterator[object], work: Callable[[object], None], num_steps: int) -> tuple[float, float]:
    """Seconds spent waiting for batches, and seconds in all, of so many steps behind the first."""
    work(next(batches))
    waited_s, started = 0.0, time.perf_counter()
    for _ in range(num_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - asked
        work(batch)
    return waited_s, time.perf_counter() - started


def measure(num_steps: int, batch_size: int, workers: int | None, load: float) -> dict[str, float]:
    """Shares of the time spent waiting, and images per second that the workers decode."""
    train = {**load_recipes()["imagenet-small"].train, "dataset": "imagenet", "batch_size": batch_size}
    config = parse_section(TrainConfig, train | {"micro_batches": 1, "validation": 0.1}, "train")
    with TemporaryDirectory(prefix="benchmark-", dir=work_folder()) as name:
        num_train = 2 * (num_steps + 2) * batch_size  # all in one epoch
        dataset = make_dataset(Path(name), num_train)
        trainer = Trainer(config, dataset, choose_compute("auto", "auto"), ALONE, workers)

        def rest(seconds: float) -> tuple[float, float]:
            wanted = [trainer.batches.indices(0, step) for step in range(num_steps + 1)]
            batches = trainer.images.batches(wanted, 0)  # without what the device does to them
            return waits(batches, lambda _batch: time.sleep(seconds), num_steps)

        steps = trainer.steps()
        next(steps)
        started = time.perf_counter()
        taken = sum(1 for _ in islice(steps, num_steps))
        step_s = (time.perf_counter() - started) / max(taken, 1)
        decode_s = rest(0)[1] / num_steps
        return {
            "images_per_s_decoded": batch_size / decode_s,
            "step_s": step_s,
            "share_waiting_beside_sleep_of_the_step": _share(rest(step_s)),
            f"share_waiting_at_{load:g}_of_what_is_decoded": _share(rest(decode_s / load)),
        }


def _share(waited: tuple[float, float]) -> float:
    return waited[0] / waited[1]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--steps", type=click.IntRange(min=1), default=40, help="Counted steps of each variant.")
@click.option("--batch-size", type=click.IntRange(min=2), default=32, help="Images of a step.")
@click.option("--workers", type=click.IntRange(min=0), default=None, help="Processes; else one a core.")
@click.option("--load", type=click.FloatRange(0, 1, min_open=True), default=0.8, help="Of the second sleep.")
def main(steps: int, batch_size: int, workers: int | None, load: float) -> None:
    """Print the share of the time that a training waits for its next batch of decoded pictures."""
    with errors_on_one_line():
        for name, value in measure(steps, batch_size, workers, load).items():
            click.echo(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()

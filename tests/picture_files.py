"""Small data sets whose training pictures stay in their files."""

from pathlib import Path

import numpy as np
from conftest import CPU
from PIL import Image

from sdpipe.data.config import ImageNetConfig
from sdpipe.data.fetch import fetch
from sdpipe.data.pictures import PictureFiles
from sdpipe.data.store import DataSet, open_dataset
from sdpipe.training.config import RandomSizeCrop
from sdpipe.training.decoding import Crop, FileImages

SIZE = 12
RESIZE = 16
CROP = {"area": [0.3, 1.0], "aspect": [0.75, 1.3333]}
AUGMENTED = {"crop": CROP, "normalisation": "channel", "colour_jitter": 0.4, "lighting": 0.1}
RANDOM_SIZE = RandomSizeCrop.model_validate(CROP)


def write_pictures(root: Path, *, num_train: int = 90, num_test: int = 12) -> None:
    """`train/<class>/*` and `val/<class>/*`: red, green and blue noise in many sizes."""
    rng = np.random.default_rng(0)
    for part, num in (("train", num_train), ("val", num_test)):
        for at in range(num):
            shape = (*rng.integers(SIZE + 4, 40, size=2), 3)
            pixels = rng.integers(0, 120, size=shape, dtype=np.uint8)
            pixels[..., at % 3] += 100
            path = root / part / "rgb"[at % 3] / f"{at}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def fetch_pictures(root: Path, folder: Path) -> DataSet:
    """As the stage does it."""
    fetch("imagenet", ImageNetConfig(source=str(root), image_size=SIZE, resize=RESIZE), folder, folder)
    return open_dataset(folder)


def make_pictures(folder: Path) -> DataSet:
    """Written and fetched."""
    write_pictures(folder / "pictures")
    return fetch_pictures(folder / "pictures", folder / "data")


def files_of(dataset: DataSet) -> PictureFiles:
    assert isinstance(dataset.train_images, PictureFiles)
    return dataset.train_images


def open_images(dataset: DataSet, workers: int, crop: Crop = RANDOM_SIZE) -> FileImages:
    return FileImages(files_of(dataset), dataset.train_labels_N, CPU, crop=crop, seed=0, workers=workers)

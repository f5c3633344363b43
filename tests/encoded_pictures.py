"""Pictures as bytes, and a folder of them."""

import io
from pathlib import Path

import numpy as np
from conftest import random_images
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(height: int = 6, width: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, channels), dtype=np.uint8)


def write_folder(path: Path) -> Path:
    """Five RGB pictures, and a sixth that is none."""
    path.mkdir()
    for at, image in enumerate(random_images(5, channels=3)):
        Image.fromarray(image).save(path / f"{at}.png")
    (path / "bad.png").write_text("hello")
    return path

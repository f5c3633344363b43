"""Pictures as bytes, and a folder of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from conftest import random_images
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(head: bytes, coded_rows: bytes, key: bytes = b"") -> bytes:
    """A PNG of a head, rows each behind a 0, and a transparent colour, if there is one."""
    chunks = [b"IHDR" + head, *([b"tRNS" + key] if key else []), b"IDAT" + zlib.compress(coded_rows), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def tiff(
    width: int, pixels: bytes, *, num_bits: int, white_is_zero: bool = False, signed: bool = False
) -> bytes:
    """A grey TIFF of one row (TIFF 6.0), which Pillow writes in 8 and 16 bits alone, black as zero."""
    tags = [
        (256, width), (257, 1), (258, num_bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8),
        (277, 1), (278, 1), (279, len(pixels)), (339, 2 if signed else 1),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags
    )
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def pixels(height: int = 6, width: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, channels), dtype=np.uint8)


def write_folder(path: Path) -> Path:
    """Five RGB pictures, and a sixth that is none."""
    path.mkdir()
    for at, image in enumerate(random_images(5, channels=3)):
        Image.fromarray(image).save(path / f"{at}.png")
    (path / "bad.png").write_text("hello")
    return path

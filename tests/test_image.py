import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from sdpipe.errors import ImageError
from sdpipe.runtime import image as image_module
from sdpipe.runtime.image import decode


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(height: int = 6, width: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_the_same_pixels_in_any_lossless_encoding(kind: str) -> None:
    array = pixels()
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(array), kind), 3, None), array)


def test_grey_to_rgb_repeats_and_rgb_to_grey_is_luma() -> None:
    grey = pixels(channels=1)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(grey[..., 0])), 3, None), np.repeat(grey, 3, axis=2)
    )
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B of (10, 200, 30) is 123.81.
    assert decode(encoded(Image.new("RGB", (1, 1), (10, 200, 30))), 1, None).ravel().tolist() == [124]


def test_sixteen_bit_grey_keeps_its_range() -> None:
    """65535 becomes 255 and 257 becomes 1, where Pillow's convert would saturate at 255."""
    values = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values)), 1, None).ravel().tolist() == [0, 1, 100, 255]


def test_exif_orientation_is_applied() -> None:
    array = pixels(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    turned = decode(encoded(Image.fromarray(array), "PNG", exif=exif), 3, None)
    np.testing.assert_array_equal(turned, np.rot90(array, -1))


def test_transparency_is_laid_over_white() -> None:
    """Half transparent black over white is (255 + 0) / 2; what is wholly transparent is not seen."""
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (0, 0, 0, 128))
    image.putpixel((1, 0), (255, 0, 0, 0))
    assert decode(encoded(image), 3, None).tolist() == [[[127, 127, 127], [255, 255, 255]]]


def test_palette_cmyk_and_animation() -> None:
    red = Image.new("RGB", (3, 3), (255, 0, 0))
    assert decode(encoded(red.quantize(2), "PNG"), 3, None)[0, 0].tolist() == [255, 0, 0]
    assert decode(encoded(red.convert("CMYK"), "TIFF"), 3, None)[0, 0].tolist() == [255, 0, 0]
    blue = Image.new("RGB", (3, 3), (0, 0, 255))
    animated = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decode(animated, 3, None)[0, 0].tolist() == [255, 0, 0]


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    array = pixels(8, 8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(array)), 3, (8, 8)), array)


def test_others_are_resized_to_cover_and_cut_in_the_centre() -> None:
    """As Pillow resizes the whole of 16 x 8 to 8 x 4 and then cuts 4 x 4 out of its middle."""
    image = Image.fromarray(pixels(8, 16))
    whole = image.resize((8, 4), Image.Resampling.BILINEAR).crop((2, 0, 6, 4))
    np.testing.assert_array_equal(decode(encoded(image), 3, (4, 4)), np.asarray(whole))
    cut = image.crop((4, 0, 12, 8))
    np.testing.assert_array_equal(decode(encoded(image), 3, (8, 8)), np.asarray(cut))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_tiny_and_thin_pictures(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("L", size, 9)), 1, (8, 8)).tolist() == [[[9]] * 8] * 8


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "empty"),
        (b"hello", "not_an_image"),
        (encoded(Image.new("RGB", (64, 64), 3))[:60], "damaged"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "unsupported_mode"),
    ],
)
def test_bad_bytes_have_a_code_and_a_reason(raw: bytes, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(raw, 3, (8, 8))
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for name, code in (
        ("folder.png", "is_a_folder"),
        ("pipe.png", "not_a_file"),
        ("nothing.png", "not_found"),
    ):
        with pytest.raises(ImageError) as caught:
            decode(tmp_path / name, 3, (8, 8))
        assert caught.value.code == code
    with pytest.raises(ImageError):
        decode(Path("a\0b"), 3, (8, 8))


def test_a_decompression_bomb_is_refused_before_its_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of 100,000 x 100,000 pixels is a few kilobytes; its header is enough to refuse it."""
    small = encoded(Image.new("L", (1, 1)))
    chunk = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + small[24:29]
    bomb = small[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + small[33:]
    with pytest.raises(ImageError) as caught:
        decode(bomb, 1, (8, 8))
    assert caught.value.code == "too_large"
    monkeypatch.setattr(image_module, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="10 x 10 pixels"):
        decode(encoded(Image.new("L", (10, 10))), 1, (8, 8))


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from sdpipe.errors import ImageError
from sdpipe.runtime.image import decode
raw = Path(sys.argv[1]).read_bytes()
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 60 * 2**20,) * 2)
for picture in (raw, Path(sys.argv[1])):
    try:
        decode(picture, 3, None)
    except ImageError as error:
        print(error.code, error)
"""


def test_too_little_memory_is_not_a_damaged_picture(tmp_path: Path) -> None:
    """7,000 x 7,000 pixels take 147 MB, and there are 60."""
    Image.new("RGB", (7000, 7000)).save(tmp_path / "big.png", compress_level=1)
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "big.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines() == [
        "no_memory not enough memory to decode its pixels",
        "no_memory not enough memory to read it",
    ]

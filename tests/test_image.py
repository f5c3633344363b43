"""Decoded pictures: the same pixels whatever the encoding."""

import struct
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from encoded_pictures import encoded, pixels, png
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdpipe.runtime import pixel_modes
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.image import centre_box, decode, image_suffixes


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_the_same_pixels_in_any_lossless_encoding(kind: str) -> None:
    array = pixels()
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(array), kind), 3, None), array)


def test_pictures_of_several_are_found_by_their_name(tmp_path: Path) -> None:
    """A camera's .mpo is a JPEG with more pictures behind it."""
    first, second = Image.fromarray(pixels(6, 9)), Image.fromarray(pixels(6, 9))
    first.save(tmp_path / "two.mpo", save_all=True, append_images=[second])
    assert decode(tmp_path / "two.mpo", 3, None).shape == (6, 9, 3)
    assert {".mpo", ".jpg", ".png"} <= image_suffixes()
    assert ".eps" not in image_suffixes()


def test_grey_to_rgb_repeats_and_rgb_to_grey_is_luma() -> None:
    grey = pixels(channels=1)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(grey[..., 0])), 3, None), np.repeat(grey, 3, axis=2)
    )
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B of (10, 200, 30) is 123.81.
    assert decode(encoded(Image.new("RGB", (1, 1), (10, 200, 30))), 1, None).ravel().tolist() == [124]


def test_sixteen_bits_give_the_same_pixels_in_any_encoding() -> None:
    """The upper 8, of grey as of colours; a binary PPM of any size, since it is not decoded in Python."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 65536, (5, 7, 1), dtype=np.uint16)
    colours = rng.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    deep = Image.fromarray(grey[..., 0])
    files = [(grey, encoded(deep, kind)) for kind in ("PNG", "TIFF", "PPM")]
    files.append((grey, encoded(deep, "JPEG2000", irreversible=False)))
    for values, letter in ((colours, b"6"), (np.repeat(grey, 3, 2), b"6"), (grey, b"5")):
        files.append((values, b"P" + letter + b" 7 5 65535\n" + values.astype(">u2").tobytes()))
        plain = {b"6": b"P3", b"5": b"P2"}[letter]
        files.append(
            (values, plain + b" 7 5 # a comment\n65535\n" + " ".join(map(str, values.flat)).encode())
        )
        planes = values[::-1].transpose(2, 0, 1).astype(">u2").tobytes()  # SGI: planes, from below
        head = struct.pack(">H2B4H", 474, 0, 2, 3 if values.shape[2] == 3 else 2, 7, 5, values.shape[2])
        files.append((values, head.ljust(512, b"\0") + planes))
        head = struct.pack(">2I5B", 7, 5, 16, 2 if values.shape[2] == 3 else 0, 0, 0, 0)
        files.append((values, png(head, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))))
    for values, raw in files:
        expected = np.broadcast_to(values >> 8, (5, 7, 3))
        np.testing.assert_array_equal(decode(raw, 3, None), expected)
    assert decode(b"P6 2000 1100 65535\n" + bytes(6 * 2000 * 1100), 3, (8, 8)).max() == 0
    assert decode(b"P3 200 200 65535\n" + b"65535 " * 3 * 200 * 200, 3, None).min() == 255


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


@pytest.mark.parametrize("side", [7, 9, 28, 32, 224])
def test_the_box_lies_in_every_picture(side: int) -> None:
    """By rounding it stuck out of pictures 116 pixels wide by 2e-15, for 28 and 224, which Pillow refuses."""
    for width, height in product(range(1, 700, 3), (1, 116, 117, 232, 450, 699)):
        left, top, right, bottom = centre_box((height, width), (side, side), 1.0)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert max(right - left, bottom - top) == pytest.approx(min(width, height), rel=1e-12)
    assert decode(encoded(Image.new("L", (116, 116), 9)), 1, (side, side)).tolist() == [[[9]] * side] * side


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_tiny_and_thin_pictures(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("L", size, 9)), 1, (8, 8)).tolist() == [[[9]] * 8] * 8


LOSSLESS = {
    "PNG": {}, "BMP": {}, "PPM": {}, "TGA": {}, "QOI": {}, "SGI": {}, "PCX": {},
    "ICO": {"bitmap_format": "bmp"}, "WEBP": {"lossless": True, "exact": True},
    "JPEG2000": {"irreversible": False},
}  # fmt: skip


def test_any_lossless_encoding_gives_the_same_logits(rgb_model_path: Path) -> None:
    """To the bit: the network sees the same pixels, cut and resized in the same way."""
    image = Image.fromarray(pixels(48, 48))
    files = [encoded(image, kind, **options) for kind, options in LOSSLESS.items()]
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"):
        files.append(encoded(image, "TIFF", compression=compression))
    files.append(encoded(image, "PNG", compress_level=0))
    files.append(encoded(image.convert("RGBA")))
    turned = Image.Exif()
    turned[0x0112] = 3
    files.append(encoded(image.rotate(180), "PNG", exif=turned))
    artifact = open_artifact(rgb_model_path, "cpu")
    cut = [decode(raw, 3, tuple(artifact.metadata.image_size)) for raw in files]
    logits = [artifact.run(image_HWC[np.newaxis])[0] for image_HWC in cut]
    for each in logits:
        np.testing.assert_array_equal(each, logits[0])


def test_any_lossless_encoding_of_grey_gives_the_same_logits(model_path: Path) -> None:
    grey = Image.fromarray(pixels(48, 48, channels=1)[..., 0])
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files = [encoded(grey, kind) for kind in ("PNG", "GIF", "BMP", "PPM", "TIFF", "TGA")]
    files += [encoded(grey.convert("RGB")), encoded(deep), encoded(deep, "TIFF"), encoded(grey.convert("LA"))]
    artifact = open_artifact(model_path, "cpu")
    cut = [decode(raw, 1, tuple(artifact.metadata.image_size)) for raw in files]
    logits = [artifact.run(image_HWC[np.newaxis])[0] for image_HWC in cut]
    for each in logits:
        np.testing.assert_array_equal(each, logits[0])


def test_exif_data_that_are_none_are_passed_over() -> None:
    """Viewers show such a picture as it is, and Pillow passes them over in a JPEG; in others it raised."""
    array = pixels(6, 9)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        for exif in (b"no data of the kind", b"Exif\0\0" + bytes(20), b"II*\0"):
            raw = encoded(Image.fromarray(array), kind, exif=exif, **options)
            np.testing.assert_array_equal(decode(raw, 3, None), array)


def test_exif_data_in_a_text_that_is_none_are_passed_over() -> None:
    """As ImageMagick writes them, in hexadecimal digits."""
    array = pixels(6, 9)
    notes = PngInfo()
    notes.add_text("Raw profile type exif", "\nexif\n    4\nno digits\n")
    raw = encoded(Image.fromarray(array), "PNG", pnginfo=notes)
    np.testing.assert_array_equal(decode(raw, 3, None), array)


def test_every_exif_orientation_is_applied() -> None:
    """As the EXIF standard defines them, 1 to 8, with numpy as the oracle."""
    array = pixels(4, 6)
    upright = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1],
        5: array.swapaxes(0, 1), 6: np.rot90(array, -1), 7: array[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(array),
    }  # fmt: skip
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            found = decode(encoded(Image.fromarray(array), kind, exif=exif), 3, None)
            np.testing.assert_array_equal(found, expected)


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are converted in strips of rows; the pixels are those of the whole."""
    rng = np.random.default_rng(0)
    deep = encoded(Image.fromarray(rng.integers(0, 65536, (50, 7), dtype=np.uint16)))
    clear = encoded(Image.fromarray(rng.integers(0, 256, (50, 7, 4), dtype=np.uint8)))
    whole = [decode(deep, 1, None), decode(clear, 3, None), decode(clear, 1, None)]
    monkeypatch.setattr(pixel_modes, "_STRIP_PIXELS", 20)  # two rows
    for first, second in zip(
        whole, [decode(deep, 1, None), decode(clear, 3, None), decode(clear, 1, None)], strict=True
    ):
        np.testing.assert_array_equal(first, second)

"""Pixels that are not 8 bits of grey or colours, opaque: what the network sees of them."""

import struct
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from encoded_pictures import encoded, png, tiff
from PIL import Image

from sdpipe.errors import ImageError
from sdpipe.runtime.image import decode


def test_transparency_is_laid_over_white() -> None:
    """Half transparent black over white is (255 + 0) / 2; what is wholly transparent is not seen."""
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (0, 0, 0, 128))
    image.putpixel((1, 0), (255, 0, 0, 0))
    assert decode(encoded(image), 3, None).tolist() == [[[127, 127, 127], [255, 255, 255]]]


@pytest.mark.parametrize("num_bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white(num_bits: int) -> None:
    """A PNG names it in its own bits: 1 of 0..3 is not the 1 of 0..255 (PNG, 11.3.2.1)."""
    head = struct.pack(">2I5B", 16 // num_bits, 1, num_bits, 0, 0, 0, 0)
    rows = {1: b"\x50\xff", 2: b"\x1b\x00", 4: b"\x01\x2f", 8: bytes([0, 1]), 16: struct.pack(">H", 1)}[
        num_bits
    ]
    values = (
        np.unpackbits(np.frombuffer(rows, np.uint8)).reshape(-1, num_bits) @ 2 ** np.arange(num_bits)[::-1]
    )
    grey = np.where(values == 1, 255, values * 255 // (2**num_bits - 1))
    raw = png(head, b"\0" + rows, struct.pack(">H", 1))
    assert decode(raw, 1, None).ravel().tolist() == grey.tolist()
    assert decode(raw, 3, None).tolist() == [[[each] * 3 for each in grey.tolist()]]


def test_only_the_very_grey_of_sixteen_bits_is_transparent() -> None:
    head = struct.pack(">2I5B", 3, 1, 16, 0, 0, 0, 0)
    raw = png(head, b"\0" + struct.pack(">3H", 0x1234, 0x1235, 0x0034), struct.pack(">H", 0x1234))
    assert decode(raw, 1, None).ravel().tolist() == [255, 0x12, 0]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_is_white_for_grey_and_colours(kind: str) -> None:
    grey = Image.fromarray(np.array([[0, 10, 20, 30]], np.uint8))
    raw = encoded(grey, kind, transparency=10)
    assert decode(raw, 1, None).ravel().tolist() == [0, 255, 20, 30]
    assert decode(raw, 3, None).tolist() == [[[0] * 3, [255] * 3, [20] * 3, [30] * 3]]


def test_a_transparent_rgb_is_white_and_gives_what_an_alpha_channel_gives() -> None:
    colours = np.array([[[0, 0, 0], [0, 0, 1], [9, 9, 9]]], np.uint8)
    alpha = np.where((colours == 0).all(axis=2), 0, 255).astype(np.uint8)[..., None]
    keyed = encoded(Image.fromarray(colours), transparency=(0, 0, 0))
    with_alpha = encoded(Image.fromarray(np.concatenate([colours, alpha], axis=2)))
    assert decode(keyed, 3, None).tolist() == [[[255] * 3, [0, 0, 1], [9] * 3]]
    for channels in (1, 3):
        np.testing.assert_array_equal(decode(keyed, channels, None), decode(with_alpha, channels, None))


def test_a_transparent_colour_of_sixteen_bits_is_refused() -> None:
    """Pillow keeps 8 of them, so that colours which differ in the lower bits would be the same."""
    head, key = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0), struct.pack(">3H", 1000, 2000, 3000)
    rows = b"\0" + key + struct.pack(">3H", 1001, 2000, 3000)
    assert decode(png(head, rows), 3, None).tolist() == [[[3, 7, 11]] * 2]
    with pytest.raises(ImageError, match="a transparent colour of 16 bits") as caught:
        decode(png(head, rows, key), 3, None)
    assert caught.value.code == "unsupported_mode"


@pytest.mark.parametrize(("num_bits", "white_is_zero"), product([8, 12, 16], [False, True]))
def test_a_grey_tiff_keeps_its_range_and_its_sense(num_bits: int, white_is_zero: bool) -> None:
    """Black, white, and just below the middle; with white as zero each the other way round."""
    highest = 2**num_bits - 1
    values = [0, highest, highest // 2, 0]
    bits = "".join(f"{value:0{num_bits}b}" for value in values)
    coded = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    if num_bits == 16:
        coded = np.array(values, "<u2").tobytes()
    raw = tiff(4, coded, num_bits=num_bits, white_is_zero=white_is_zero)
    expected = [255, 0, 128, 255] if white_is_zero else [0, 255, 127, 0]
    if num_bits == 12 and white_is_zero:  # Pillow knows no such file
        with pytest.raises(ImageError):
            decode(raw, 1, None)
        return
    assert decode(raw, 1, None).ravel().tolist() == expected


def test_thirty_two_bits_are_read_as_sixteen_and_a_sign_is_refused() -> None:
    values = np.array([0, 65535, 0x1234], "<u4")
    assert decode(tiff(3, values.tobytes(), num_bits=32), 1, None).ravel().tolist() == [0, 255, 0x12]
    for values, num_bits in ((np.array([0, 65536, 1], "<u4"), 32), (np.array([0, 1, 2], "<i2"), 16)):
        raw = tiff(3, values.tobytes(), num_bits=num_bits, signed=num_bits == 16)
        with pytest.raises(ImageError) as caught:
            decode(raw, 1, None)
        assert caught.value.code == "unsupported_mode"


def test_a_transparent_grey_counts_in_its_own_bits_and_before_the_pixels() -> None:
    """PNG: decoders mask the upper bits, and tRNS stands before IDAT."""
    head = struct.pack(">2I5B", 2, 1, 4, 0, 0, 0, 0)
    raw = png(head, b"\0\x12", struct.pack(">H", 0x11))
    assert decode(raw, 1, None).ravel().tolist() == [255, 34]
    start, key, end = raw.index(b"tRNS") - 4, raw.index(b"IDAT") - 4, raw.index(b"IEND") - 4
    late = raw[:start] + raw[key:end] + raw[start:key] + raw[end:]
    assert decode(late, 1, None).ravel().tolist() == [17, 34]


def test_cielab_is_the_same_colours_and_their_grey(tmp_path: Path) -> None:
    """Pillow has no way from it to grey but through colours."""
    path = tmp_path / "lab.tiff"
    Image.frombytes("LAB", (2, 1), bytes([200, 10, 240, 90, 128, 128])).save(path)
    rgb = decode(path, 3, None)
    assert len(np.unique(rgb)) > 2
    np.testing.assert_array_equal(decode(path, 1, None)[..., 0], Image.fromarray(rgb).convert("L"))


def test_a_palette_that_is_missing_is_one_line() -> None:
    """Pillow raises an AssertionError of its own."""
    with pytest.raises(ImageError):
        decode(png(struct.pack(">2I5B", 2, 1, 8, 3, 0, 0, 0), b"\0\1\2"), 3, None)


def test_a_tiff_that_does_not_say_has_white_as_zero_in_any_depth() -> None:
    """As Pillow reads those of 8 bits."""
    for num_bits, values in ((8, np.array([0, 255, 127], "u1")), (16, np.array([0, 65535, 0x7F00], "<u2"))):
        raw = tiff(3, values.tobytes(), num_bits=num_bits).replace(
            struct.pack("<H", 262), struct.pack("<H", 260)
        )
        assert decode(raw, 1, None).ravel().tolist() == [255, 0, 128]

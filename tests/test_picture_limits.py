"""Pictures that are small files and much work: refused by their heads, and the largest that are not."""

import struct
import threading
import time
import zlib
from itertools import pairwise

import numpy as np
import pytest
from encoded_pictures import encoded, pixels
from PIL import Image

from sdpipe.errors import ImageError
from sdpipe.runtime.image import Turn, decode

BOUND_S = 5  # of processor time, on a slow and busy one; without the limits 9 s and more on a fast one


def refusal(raw: bytes) -> ImageError:
    """Why, within BOUND_S."""
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        decode(raw, 3, (8, 8))
    assert time.process_time() - started < BOUND_S
    assert "\n" not in str(caught.value)
    return caught.value


def many_scans(size: tuple[int, int], number: int) -> bytes:
    """A progressive JPEG whose second scan comes so many times more."""
    raw = encoded(Image.new("L", size, 128), "JPEG", progressive=True)
    starts = [at for at in range(len(raw)) if raw.startswith(b"\xff\xda", at)]
    first, second = list(pairwise(starts))[1]
    # Between two scans stand their tables, which may come again, too.
    return raw[:second] + raw[first:second] * number + raw[second:]


def test_scans_of_a_jpeg_are_counted() -> None:
    """5,000 scans of 64 million pixels take 17 s; ten, as encoders write, and 600 small ones are read."""
    error = refusal(many_scans((4000, 2000), 200))
    assert (error.code, str(error)) == ("too_large", "206 scans of 4000 x 2000 pixels")
    assert refusal(many_scans((16, 16), 700)).code == "too_large"
    assert decode(many_scans((16, 16), 590), 1, None).tolist() == [[[128]] * 16] * 16
    rgb = Image.fromarray(pixels(64, 64))
    np.testing.assert_array_equal(
        decode(encoded(rgb, "JPEG", progressive=True), 3, None), decode(encoded(rgb, "JPEG"), 3, None)
    )


def test_what_only_looks_like_scans_is_not_counted() -> None:
    """Behind a picture's end a phone puts a film, and a segment before it may hold a small picture."""
    image = Image.new("L", (4000, 2000), 128)
    scans = b"\xff\xda" * 500
    expected = decode(encoded(image, "JPEG"), 1, (8, 8))
    for raw in (encoded(image, "JPEG") + scans, encoded(image, "JPEG", comment=scans)):
        np.testing.assert_array_equal(decode(raw, 1, (8, 8)), expected)
    many = many_scans((4000, 2000), 200)
    ends = many[:2] + b"\xff\xfe\0\6\xff\xd9\xff\xd9" + many[2:]  # a comment that holds two ends
    assert str(refusal(ends)) == "206 scans of 4000 x 2000 pixels"
    # Marks without a length, of which libjpeg passes over the first, and over the others between restarts.
    for before in (b"\xff\xff", b"\xff\x01", b"\xff\xd0\xff\x02", b"\xff\xd0\xff\xbf"):
        first, *others = many.split(b"\xff\xda")
        hidden = b"\xff\xda".join([first, (before + b"\xff\xda").join(others)])
        assert str(refusal(hidden)) == "206 scans of 4000 x 2000 pixels"


def test_filling_before_a_mark_is_bounded() -> None:
    """16 MiB of it took 3 s, 32 MiB 15 s; behind the end it costs nothing."""
    raw = encoded(Image.new("L", (64, 64), 128), "JPEG")
    error = refusal(raw[:-2] + b"\xff" * 2**24 + raw[-2:])
    assert (error.code, str(error)) == ("too_large", "over 262,144 bytes of filling")
    assert decode(raw + b"\xff" * 2**24, 1, None).max() == 128


def icon(content: bytes) -> bytes:
    """An ICO file with one picture, which its directory says is 256 x 256."""
    return struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(content), 22) + content


def png(width: int, height: int) -> bytes:
    """A head without pixels."""
    chunk = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each))
        for each in (chunk, pixels)
    )


def test_what_is_inside_an_icon_is_judged_by_its_own_head() -> None:
    """A PNG and a bitmap of over 64 million pixels, also by a second head; an icon of 9 MiB."""
    bitmap = struct.pack("<Iii2H6I", 40, 20_000, 20_000, 1, 1, 0, 0, 0, 0, 2, 0) + bytes(8)
    second = png(8001, 8000)[8:]
    for content in (png(8001, 8000), bitmap, png(8, 8)[:33] + second, png(8, 8) + bytes(9 * 2**20)):
        assert refusal(icon(content)).code == "too_large"
    assert refusal(icon(png(800, 800))).code == "damaged"


def test_icons_are_decoded_one_at_a_time() -> None:
    """Opening one decodes it, so it waits for its turn before that."""
    raw = encoded(Image.new("RGB", (32, 32), (1, 2, 3)), "ICO")
    reader = threading.Thread(target=decode, args=(raw, 3, None))
    with Turn() as turn:
        turn.take()
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
    reader.join(10)
    assert not reader.is_alive()


def run_lengths(size: int, coded: bytes) -> bytes:
    """A BMP with 8 bits a pixel in run lengths."""
    head = struct.pack("<Iii2H6I", 40, size, size, 1, 8, 1, len(coded), 0, 0, 256, 0)
    head += b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
    return b"BM" + struct.pack("<I2HI", 14 + len(head) + len(coded), 0, 0, 14 + len(head)) + head + coded


SLOW = {
    "plain grey": b"P2\n2500 2000\n255\n" + b"7 " * 5_000_000,
    "plain colour": b"P3\n2500 2000\n255\n",
    "plain bits": b"P1\n8000 8000\n",
    "values up to 254": b"P6\n2500 2000\n254\n",
    "comments between pixels": b"P2\n1000 1000\n255\n" + b"7 #\n" * 1_000_000,
    "spaces between pixels": b"P2\n10 10\n255\n" + b" " * 2**20,
    "runs that end nowhere": run_lengths(100, b"\0\2\0\0" * 100_000),
    "QOI": b"qoif" + struct.pack(">2I2B", 2500, 2000, 3, 0) + bytes(100),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_python_decodes_has_lower_limits(name: str) -> None:
    """Pillow's decoders in Python take up to a microsecond a pixel, and some of them for what is no pixel."""
    assert refusal(SLOW[name]).code == "too_large"


def test_the_head_of_a_ppm_is_short() -> None:
    """It is read byte by byte: 10 MB of comment take a second, 256 MB half a minute."""
    assert refusal(b"P5 #" + b"x" * 10_000_000 + b"\n1 1\n255\n\7").code == "too_large"
    assert decode(b"P5 #" + b"x" * 60_000 + b"\n1 1\n255\n\7", 1, None).tolist() == [[[7]]]


def test_pictures_within_the_limits_are_read_by_every_decoder() -> None:
    """Full HD in QOI; 254 as the highest value; a large plain PGM with comments; 32 x 32 in run lengths."""
    flat = Image.new("RGB", (1920, 1080), (1, 2, 3))
    np.testing.assert_array_equal(decode(encoded(flat, "QOI"), 3, None), np.asarray(flat))
    grey = pixels(200, 300, 1)[..., 0] // 2
    odd = decode(b"P5\n300 200\n254\n" + grey.tobytes(), 1, None)[..., 0]
    assert np.abs(odd.astype(int) - grey).max() <= 1
    rows = b"".join(b" ".join(b"%d" % value for value in row) + b" # a row\n" for row in grey.tolist())
    np.testing.assert_array_equal(decode(b"P2\n300 200\n255\n" + rows, 1, None)[..., 0], grey)
    assert (decode(run_lengths(32, b"\x20\x09\0\0" * 32), 1, None) == 9).all()


JPEG = encoded(Image.new("L", (8, 8)), "JPEG")
GIF = encoded(Image.new("L", (8, 8)), "GIF", optimize=False)
JPEG_2000 = encoded(Image.new("L", (8, 8)), "JPEG2000")
EMPTY_CHUNK = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
MANY_PARTS = {  # a picture, where in it a part stands any number of times, and the part
    "PNG": (encoded(Image.new("L", (8, 8)), "PNG"), 33, EMPTY_CHUNK),
    "JPEG": (JPEG, 2, b"\xff\xfe\0\2"),
    "bytes between a JPEG's parts": (JPEG, 2, b"\xff"),
    "GIF": (GIF, GIF.index(b",", 13 + 3 * 256), b"!\xfe\1x\0"),
    "bytes between a GIF's parts": (GIF, GIF.index(b",", 13 + 3 * 256), b"\1"),
    "JPEG 2000": (JPEG_2000, 32, struct.pack(">I4s", 8, b"free")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY_PARTS)
def test_parts_are_counted(name: str) -> None:
    """Ten million would take Pillow up to 18 s; tens of thousands are read."""
    raw, at, part = MANY_PARTS[name]
    error = refusal(raw[:at] + 10_000_000 * part + raw[at:])
    assert (error.code, str(error)) == ("too_large", "read in over 500,000 parts")
    assert decode(raw[:at] + 50_000 * part + raw[at:], 1, None).tolist() == [[[0]] * 8] * 8


@pytest.mark.slow
def test_bytes_of_what_is_held_whole_or_read_slowly_are_bounded() -> None:
    """WebP of 48 megapixels in 250 MB took 1.5 GiB, a progressive JPEG of 71 MB 2.3 s, 4,000 tables 9 s."""
    webp = encoded(Image.new("L", (8, 8)), "WEBP")
    padded = webp + b"junk" + struct.pack("<I", 2**25) + bytes(2**25)
    padded = padded[:4] + struct.pack("<I", len(padded) - 8) + padded[8:]
    avif = encoded(Image.new("L", (8, 8)), "AVIF")
    tables = b"\xff\xdb" + struct.pack(">H", 2 + 65 * 1000) + (b"\0" + b"\1" * 64) * 1000
    head = "over 32 MiB to be read before its pixels"
    for raw in (padded, avif + struct.pack(">I4s", 8 + 2**25, b"free") + bytes(2**25)):
        assert str(refusal(raw)) == head
    assert str(refusal(JPEG[:2] + tables * 3800 + JPEG[2:])) == head
    assert decode(JPEG[:2] + tables * 100 + JPEG[2:], 1, None).shape == (8, 8, 1)
    progressive = encoded(Image.new("L", (8, 8)), "JPEG", progressive=True)
    assert str(refusal(progressive + bytes(2**25))) == "a progressive JPEG of over 32 MiB"
    assert str(refusal(JPEG_2000 + bytes(2**24))) == "JPEG 2000 of over 16 MiB"
    for raw in (JPEG, encoded(Image.new("L", (8, 8)), "TIFF", tiffinfo={37724: bytes(2**25)})):
        assert decode(raw + bytes(2**25), 1, None).shape == (8, 8, 1)


def test_exif_data_is_bounded_and_not_written_again() -> None:
    """60 million numbers in it took 40 s and 10 GiB. Six million are read, and the picture is put upright."""
    for count, is_refused in ((12_000_000, True), (6_000_000, False)):
        exif = b"II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHII", 0x112, 3, 1, 6)
        exif += struct.pack("<HHII", 0x9999, 3, count, 64) + bytes(4)
        exif = exif.ljust(64, b"\0") + b"\1\0" * count
        raw = encoded(Image.new("L", (8, 4)), "PNG", exif=exif)
        if is_refused:
            assert str(refusal(raw)) == "over 16 MiB of EXIF data"
        else:
            started = time.process_time()
            assert decode(raw, 1, None).shape == (8, 4, 1)
            assert time.process_time() - started < BOUND_S

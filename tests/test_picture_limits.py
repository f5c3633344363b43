"""Pictures that are small files and much work: refused by their heads, and the largest that are not."""

import struct
import threading
import time
import zlib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from test_image import encoded, pixels

from sdpipe.errors import ImageError
from sdpipe.runtime.image import Turn, decode


def refusal(raw: bytes) -> ImageError:
    """Why, within two seconds."""
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        decode(raw, 3, (8, 8))
    assert time.process_time() - started < 2
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


@pytest.mark.parametrize("name", MANY_PARTS)
def test_parts_are_counted(name: str) -> None:
    """Ten million would take Pillow up to 18 s; tens of thousands are read."""
    raw, at, part = MANY_PARTS[name]
    error = refusal(raw[:at] + 10_000_000 * part + raw[at:])
    assert (error.code, str(error)) == ("too_large", "read in over 500,000 parts")
    assert decode(raw[:at] + 50_000 * part + raw[at:], 1, None).tolist() == [[[0]] * 8] * 8


def tiff(num_strips: int, *, order: str, is_big: bool = False) -> bytes:
    """A column of pixels of the value 9, each in a strip of its own; all are the same byte of the file."""
    size, letter = (8, "Q") if is_big else (4, "I")
    data = 1000
    counts = data + 1 + num_strips * size
    tags = [
        (256, 1, 1), (257, 1, num_strips), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, num_strips, data + 1),
        (277, 1, 1), (278, 1, 1), (279, num_strips, counts),
    ]  # fmt: skip
    head = {"<": b"II", ">": b"MM"}[order]
    if is_big:
        head += struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(tags))
    else:
        head += struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, count, value in tags:
        head += struct.pack(f"{order}HH{letter}{letter}", tag, 16 if is_big else 4, count, value)
    head += bytes(size)
    numbers = [num_strips * struct.pack(f"{order}{letter}", number) for number in (data, 1)]
    return head.ljust(data, b"\0") + b"\x09" + b"".join(numbers)


def test_strips_of_a_tiff_are_counted() -> None:
    """Six million take Pillow 21 s and 2 GiB."""
    for order, is_big in (("<", False), (">", False), ("<", True)):
        error = refusal(tiff(6_000_000, order=order, is_big=is_big))
        assert (error.code, str(error)) == ("too_large", "a tag of over 250,000 numbers")
        few = decode(tiff(1000, order=order, is_big=is_big), 1, None)
        assert few.tolist() == [[[9]]] * 1000
    assert refusal(tiff(100, order="<")[:6]).code in ("damaged", "not_an_image")


def deflated_tiff(size: int, more: dict[int, tuple[int, int]], data: bytes) -> bytes:
    """A grey square as `data` in one deflated strip at 8, or as tags say that come in addition or instead.

    more: number of each, and the number or where the numbers stand in the file.
    """
    tags = {
        256: (1, size), 257: (1, size), 258: (1, 8), 259: (1, 8), 262: (1, 1), 273: (1, 8), 277: (1, 1),
        278: (1, size), 279: (1, len(data)), **more,
    }  # fmt: skip
    head = b"II" + struct.pack("<HI", 42, 8 + len(data))
    return head + data + directory([(tag, 4, *tags[tag]) for tag in sorted(tags)])


def directory(entries: list[tuple[int, int, int, int]]) -> bytes:
    """Tags of a TIFF: their numbers, types, counts, and values or places."""
    coded = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + coded + bytes(4)


def test_strips_that_stand_in_the_same_bytes_are_measured() -> None:
    """Bits in the other order: libtiff turned 1 MB for each of 249,000 strips, 45 s. Few of them are read."""

    def shared(num_strips: int) -> bytes:
        coded = bytes(int(f"{byte:08b}"[::-1], 2) for byte in zlib.compress(bytes(num_strips)))
        data = coded.ljust(1_000_000, b"\0")
        data += struct.pack("<I", 8) * num_strips + struct.pack("<I", 1_000_000) * num_strips
        places, counts = 1_000_008, 1_000_008 + 4 * num_strips
        return deflated_tiff(
            num_strips,
            {266: (1, 2), 278: (1, 1), 273: (num_strips, places), 279: (num_strips, counts)},
            data,
        )

    assert str(refusal(shared(7000))) == "strips or tiles of over 512 MiB in all"
    assert (decode(shared(100), 1, None) == 0).all()


def test_a_strip_or_tile_is_measured_whole() -> None:
    """Of a tile of 20,000 x 20,000, 100 x 100 shown, libtiff unfolded all: 1.6 GiB in four colours."""
    data = zlib.compress(bytes(512 * 512))

    def tiled(side: int) -> bytes:
        tags = {322: (1, side), 323: (1, side), 324: (1, 8), 325: (1, len(data))}
        return deflated_tiff(100, tags, data)

    assert str(refusal(tiled(20_000))) == "a strip or tile of over 192 MiB"
    assert (decode(tiled(512), 1, None) == 0).all()
    # The rows of a strip that goes on below the picture are not unfolded.
    assert (decode(deflated_tiff(100, {278: (1, 2**32 - 1)}, data), 1, None) == 0).all()
    assert str(refusal(deflated_tiff(7900, {258: (1, 32)}, data))) == "a strip or tile of over 192 MiB"


@pytest.mark.parametrize("kind", [3, 5])
@pytest.mark.parametrize("is_deeper", [False, True])
def test_numbers_in_exif_data_of_a_tiff_are_counted(kind: int, is_deeper: bool) -> None:
    """Two million fractions took 4 s, 20 million whole numbers 1.1 GiB; EXIF data hold more of them."""
    for count, num_tags, is_refused in ((2_000_000, 1, True), (200_000, 4, True), (200, 4, False)):
        data = zlib.compress(bytes(64)).ljust(92, b"\0") + bytes([7]) * (8 * count * num_tags)
        tags = {34665: (1, 8 + len(data))}
        data += directory([(0xF000 + at, kind, count, 100) for at in range(num_tags)])
        if is_deeper:
            inner, outer = tags[34665][1], 8 + len(data)
            tags = {34665: (1, outer), 40965: (1, inner)}
            data += directory([(40965, 4, 1, inner)])
        raw = deflated_tiff(8, tags, data)
        if is_refused:
            assert "numbers" in str(refusal(raw))
        else:
            assert (decode(raw, 1, None) == 0).all()


def jpeg_2000(
    size: int,
    *,
    block: int = 4,
    levels: int = 5,
    precinct: int = 15,
    tile: int | None = None,
    components: int = 1,
) -> bytes:
    """A grey square in which nothing is coded: JP2 boxes, one of no use, and a codestream.

    block, precinct: binary logarithms of their sides, that of a block less 2, as they stand in the file.
    """

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">2BH", 0xFF, marker, len(content) + 2) + content

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    part = tile or size
    siz = struct.pack(">H8IH", 0, size, size, 0, 0, part, part, 0, 0, components) + b"\7\1\1" * components
    precincts = bytes([precinct * 17]) * (levels + 1)
    cod = struct.pack(">2BHB5B", 1, 0, 1, 0, levels, block, block, 0, 1) + precincts
    qcd = b"\x40" + b"\x48" * (3 * levels + 1)
    stream = b"\xff\x4f" + segment(0x51, siz) + segment(0x52, cod) + segment(0x5C, qcd)
    stream += (
        b"\xff\x90" + struct.pack(">2HI2B", 10, 0, 14 + 64, 0, 1) + b"\xff\x93" + bytes(64) + b"\xff\xd9"
    )
    head = box(b"ihdr", struct.pack(">2IH4B", size, size, 1, 7, 7, 0, 0)) + box(b"colr", b"\1\0\0\0\0\0\x11")
    return (
        JPEG_2000[:12] + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", head) + box(b"free", b"")
        + box(b"jp2c", stream)
    )  # fmt: skip


def test_code_blocks_tiles_and_components_of_jpeg_2000_are_counted() -> None:
    """166 bytes took 5 GiB with nine million precincts, 3 KB as much with 1,000 components in 5,000 tiles."""
    assert str(refusal(jpeg_2000(5600, block=0))) == "over 131,072 code blocks"
    assert str(refusal(jpeg_2000(3000, precinct=1))) == "over 131,072 code blocks"
    assert str(refusal(jpeg_2000(2000, precinct=0, levels=0))) == "over 131,072 code blocks"
    assert str(refusal(jpeg_2000(1000, tile=10))) == "over 8,192 tiles"
    assert str(refusal(jpeg_2000(1000, tile=100, components=1000))) == "1,000 components"
    for size, options in ((500, {"block": 0}), (500, {"precinct": 3}), (500, {"tile": 10}), (2000, {})):
        assert decode(jpeg_2000(size, **options), 1, None).shape == (size, size, 1)
    kept = Image.fromarray(pixels(150, 200))
    for options in ({"codeblock_size": (4, 4)}, {"precinct_size": (128, 128)}, {"tile_size": (64, 64)}):
        raw = encoded(kept, "JPEG2000", irreversible=False, **options)
        np.testing.assert_array_equal(decode(raw, 3, None), np.asarray(kept))


def test_changes_of_the_coding_style_count_wherever_they_stand() -> None:
    """A tile may have blocks of its own; one component, too."""
    raw, at = jpeg_2000(3000), jpeg_2000(3000).index(b"\xff\x93")
    for segment in (b"\x52\0\x0c\0\0\0\1\0\5\0\0\0\1", b"\x53\0\x09\0\0\5\0\0\0\1"):
        assert str(refusal(raw[:at] + b"\xff" + segment + raw[at:])) == "over 131,072 code blocks"


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
            assert time.process_time() - started < 2

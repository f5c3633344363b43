"""What a picture may cost, judged by its head before its pixels are decoded.

H, W: height and width. The times are of one core of an AMD EPYC, Pillow 13.
"""

import io
import math
import re
import struct

import numpy as np
from PIL import Image, ImageFile

from sdpipe.errors import ImageError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before their pixels are decoded (192 MB as RGB)."""

_MAX_PIXELS_OF = {"AVIF": 40_000_000, "JPEG2000": 32_000_000, "WEBP": 48_000_000}
# While decoding they take 13 bytes a pixel (of 8 bits; those of 10 and 12 take more), 24 and 16.

# What is read while a picture is opened is its head; of AVIF and WebP it is the whole file, which their
# decoders hold up to three times. The tables of a JPEG cost 33 nanoseconds a byte.
_MAX_HEAD_BYTES = 2**25

# Decoders of Pillow's that are written in Python (QOI, plain and odd PPM, run lengths in BMP) take up to 0.9
# microseconds a pixel, and 0.2 a byte that makes none. Full HD is 2,073,600 pixels.
_MAX_PIXELS_IN_PYTHON = 2_100_000
_MAX_BYTES_A_PIXEL = 12
_MAX_COMMENTS = 1000  # of a plain PPM; each copies up to a megabyte

# A scan of a progressive JPEG goes over all of the picture again, at 0.2 to 4 nanoseconds a pixel. Encoders
# write 10, or 18 for CMYK; small pictures may have 600.
_MAX_SCANNED = 20 * MAX_PIXELS
_LEAST_SCANNED = 2**21
_MAX_PROGRESSIVE_BYTES = 2**25  # 32 nanoseconds a byte

# Of JPEG 2000, a byte takes 0.12 microseconds, a tile 10 KB of memory, and a code block 500 bytes, even an
# empty one. Encoders write blocks of 64 x 64; the smallest are 1 x 1.
_MAX_JPEG_2000_BYTES = 2**24
_MAX_BLOCKS = 2**17
_MAX_TILES = 2**13
_MAX_COMPONENTS = 4

# Pillow reads a PNG, a GIF, and the heads of other formats, part by part, at 0.1 to 1 microseconds a read, of
# which a part takes 2 to 5. libpng's parts have 8 KiB, so that 32,000 fill the largest file that is read.
_MAX_READS = 500_000

# Each of a TIFF's tiles costs 4 microseconds and 350 bytes. Those of 16 x 16, the smallest that the format
# knows, are 250,000 in the largest picture; two tags say where they stand. EXIF data are tags, too, and a
# number in them costs up to 2 microseconds.
_MAX_IN_TAG = 250_000
_MAX_IN_TAGS = 600_000
_MAX_TAGS = 2**16  # of BigTIFF, which has room for more

# libtiff unfolds a strip or a tile whole, however little of it the picture shows, and may turn every bit that
# it is coded in. Many may stand in the same bytes.
_MAX_STRIP_BYTES = 192 * 2**20
_MAX_CODED_BYTES = 2**29
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"II\0*", b"MM*\0")  # as Pillow knows it; + is BigTIFF
_TEXT_OR_BYTES = (1, 2, 7)  # types of tags whose numbers are not taken apart
_WHOLE = {1: "u1", 3: "u2", 4: "u4", 6: "u1", 8: "u2", 9: "u4", 13: "u4", 16: "u8"}  # types of whole numbers
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _STRIP_ROWS = 256, 257, 258, 259, 277, 278
_STRIP_COUNTS, _TILE_COUNTS, _TILE_WIDTH, _TILE_HEIGHT = 279, 325, 322, 323  # counts: of coded bytes
_DIRECTORIES = (34665, 34853, 40965)  # EXIF data, with place and interoperability
_JUDGED = (
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _STRIP_ROWS, _STRIP_COUNTS, _TILE_COUNTS, _TILE_WIDTH,
    _TILE_HEIGHT, *_DIRECTORIES,
)  # fmt: skip

_EXIF_BYTES = 2**24
_HEAD_BYTES = 2**16
_MAX_ICON_BYTES = 2**23
_PNG = b"\x89PNG\r\n\x1a\n"


def open_within_limits(raw: bytes, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Open a picture as Image.open does, to be loaded next.

    Raises ImageError for what would take too much time or memory, now or when its pixels are decoded.
    """
    if is_icon(raw):
        if len(raw) > _MAX_ICON_BYTES:
            raise ImageError("too_large", f"an icon of over {_MAX_ICON_BYTES // 2**20} MiB")
        _judge_head(_inside(raw), raw)
    stream = _Stream(raw)
    if raw.startswith(_TIFF):
        _judge_tiff(raw)
        stream.bytes_left = math.inf  # also what other programs keep in its tags, such as layers
    image = Image.open(stream, formats=formats)
    stream.bytes_left = math.inf
    image.tile = [_in_c(tile) for tile in image.tile]
    if _judge_head(image, raw):
        stream.reads_left = math.inf  # these read byte by byte, within limits of their own
    return image


def _in_c(tile: ImageFile._Tile) -> ImageFile._Tile:
    """Of a binary PPM in 16 bits, the upper 8, as of other formats; Pillow rounds them, in Python."""
    is_deep = tile.codec_name == "ppm" and tile.args == ("RGB", 65535)
    return tile._replace(codec_name="raw", args="RGB;16B") if is_deep else tile


def judge_exif(image: ImageFile.ImageFile) -> None:
    """Raise ImageError for more EXIF data than any camera writes, of a loaded picture."""
    if len(image.info.get("exif", b"")) > _EXIF_BYTES:
        raise ImageError("too_large", f"over {_EXIF_BYTES // 2**20} MiB of EXIF data")


class _Stream(io.BytesIO):
    """Bytes that can be asked for so many times, and at first for so many, whatever the format is."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.reads_left: float = _MAX_READS
        self.bytes_left: float = _MAX_HEAD_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageError("too_large", f"read in over {_MAX_READS:,} parts")
        found = super().read(size)
        self.bytes_left -= len(found)
        if self.bytes_left < 0:
            raise ImageError("too_large", f"over {_MAX_HEAD_BYTES // 2**20} MiB to be read before its pixels")
        return found


def _judge_tiff(raw: bytes) -> None:
    """Raise ImageError for too much in the tags, strips or tiles of a TIFF's first picture."""
    order, is_big = "<" if raw.startswith(b"II") else ">", raw[2:3] == b"+"
    try:
        (place,) = struct.unpack_from(order + ("8xQ" if is_big else "4xI"), raw)
    except struct.error:
        return  # cut off, which Pillow finds, too
    tags = _read_tags(raw, order, place, is_big=is_big)
    num_numbers, waiting = 0, [(tags, 2)]
    while waiting:
        above, levels = waiting.pop()
        num_numbers += sum(count for count, _ in above.values())
        for tag in _DIRECTORIES if levels else ():
            for below in above[tag][1][:1].tolist() if tag in above else ():
                waiting.append((_read_tags(raw, order, below, is_big=is_big), levels - 1))
    if num_numbers > _MAX_IN_TAGS:
        raise ImageError("too_large", f"tags of over {_MAX_IN_TAGS:,} numbers")
    _judge_strips({tag: numbers for tag, (_, numbers) in tags.items() if len(numbers)})


def _read_tags(raw: bytes, order: str, place: int, *, is_big: bool) -> dict[int, tuple[int, np.ndarray]]:
    """Of each tag in a directory, how many numbers are taken apart, and those of tags that are judged.

    TIFF 6.0, section 2; BigTIFF has 8 bytes for what TIFF has 4 or 2. What is cut off is left out. Raises
    ImageError for too many tags, or numbers in one.
    """
    first, letter = ("Q", "Q") if is_big else ("H", "I")
    head = struct.Struct(f"{order}HH{letter}")
    room = struct.calcsize(order + letter)
    start = place + struct.calcsize(order + first)
    num_tags = int.from_bytes(raw[place:start], "little" if order == "<" else "big")
    if num_tags > _MAX_TAGS:
        raise ImageError("too_large", f"over {_MAX_TAGS:,} tags")
    tags: dict[int, tuple[int, np.ndarray]] = {}
    for at in range(start, start + num_tags * (head.size + room), head.size + room):
        if at + head.size + room > len(raw):
            break
        tag, kind, count = head.unpack_from(raw, at)
        is_judged = tag in _JUDGED and kind in _WHOLE
        if count > _MAX_IN_TAG and (is_judged or kind not in _TEXT_OR_BYTES):
            raise ImageError("too_large", f"a tag of over {_MAX_IN_TAG:,} numbers")
        if tag in tags:  # the first one counts
            continue
        numbers = np.zeros(0)
        if is_judged:
            number = np.dtype(order + _WHOLE[kind])
            values = at + head.size
            if count * number.itemsize > room:
                (values,) = struct.unpack_from(order + letter, raw, values)
            coded = raw[values : values + count * number.itemsize]
            numbers = np.frombuffer(coded, number, len(coded) // number.itemsize)
        tags[tag] = (0 if kind in _TEXT_OR_BYTES else count, numbers)
    return tags


def _judge_strips(tags: dict[int, np.ndarray]) -> None:
    """Raise ImageError for a strip or tile that unfolds to too much, or too many bytes that they stand in."""
    num_coded = sum(tags[tag].astype(float).sum() for tag in (_STRIP_COUNTS, _TILE_COUNTS) if tag in tags)
    if num_coded > _MAX_CODED_BYTES:
        raise ImageError("too_large", f"strips or tiles of over {_MAX_CODED_BYTES // 2**20} MiB in all")

    def number(tag: int, otherwise: int) -> int:
        return int(tags[tag].max()) if tag in tags else otherwise

    if number(_COMPRESSION, 1) == 1:
        return  # not libtiff's
    height = number(_HEIGHT, 0)
    columns, rows = number(_WIDTH, 0), min(number(_STRIP_ROWS, height), height)
    num_pixels = max(columns * rows, number(_TILE_WIDTH, 0) * number(_TILE_HEIGHT, 0))
    if num_pixels * number(_SAMPLES, 1) * number(_BITS, 1) > 8 * _MAX_STRIP_BYTES:
        raise ImageError("too_large", f"a strip or tile of over {_MAX_STRIP_BYTES // 2**20} MiB")


def is_icon(raw: bytes) -> bool:
    """Whether Pillow takes it for an ICO file, which it decodes while opening it."""
    return raw.startswith(b"\0\0\1\0")


def _inside(raw: bytes) -> ImageFile.ImageFile:
    """The picture of an icon that Pillow decodes, opened."""
    from PIL import BmpImagePlugin, IcoImagePlugin, PngImagePlugin  # few pictures are icons

    stream = _Stream(raw)
    stream.seek(IcoImagePlugin.IcoFile(stream).entry[0].offset)
    is_png = raw.startswith(_PNG, stream.tell())
    return PngImagePlugin.PngImageFile(stream) if is_png else BmpImagePlugin.DibImageFile(stream)


def _judge_head(image: ImageFile.ImageFile, raw: bytes) -> bool:
    """Whether Python decodes an opened picture. Raises ImageError if that would take too long or too much."""
    width, height = image.size
    num_pixels = width * height
    codecs = [tile[0] for tile in image.tile]
    in_python = any(codec in Image.DECODERS for codec in codecs)
    limit = _MAX_PIXELS_IN_PYTHON if in_python else _MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)
    if num_pixels > limit:
        raise ImageError("too_large", f"{width} x {height} pixels, at most {limit:,} are decoded")
    if in_python and len(raw) > _MAX_BYTES_A_PIXEL * num_pixels + _HEAD_BYTES:
        raise ImageError("too_large", f"{len(raw):,} bytes for {width} x {height} pixels")
    if "ppm_plain" in codecs and raw.count(b"#") > _MAX_COMMENTS:
        raise ImageError("too_large", f"over {_MAX_COMMENTS:,} comments")
    if "jpeg" in codecs:
        _judge_scans(image, raw)
    if "jpeg2k" in codecs:
        _judge_jpeg_2000(image.size, raw)
    return in_python


def _judge_scans(image: ImageFile.ImageFile, raw: bytes) -> None:
    """Raise ImageError for a JPEG with too many scans, or a progressive one of too many bytes."""
    width, height = image.size
    num_scans = raw.count(b"\xff\xda")  # coded pixels do not hold these bytes
    if num_scans * max(width * height, _LEAST_SCANNED) > _MAX_SCANNED:
        raise ImageError("too_large", f"{num_scans:,} scans of {width} x {height} pixels")
    if "progressive" in image.info and len(raw) > _MAX_PROGRESSIVE_BYTES:
        raise ImageError("too_large", f"a progressive JPEG of over {_MAX_PROGRESSIVE_BYTES // 2**20} MiB")


def _judge_jpeg_2000(size: tuple[int, int], raw: bytes) -> None:
    """Raise ImageError for a JPEG 2000 file in too many bytes, components, tiles or code blocks.

    ISO/IEC 15444-1, A.5.1, A.6.1 and A.6.2: SIZ, COD and COC, wherever they may stand.
    """
    if len(raw) > _MAX_JPEG_2000_BYTES:
        raise ImageError("too_large", f"JPEG 2000 of over {_MAX_JPEG_2000_BYTES // 2**20} MiB")
    for match in re.finditer(rb"\xff\x4f\xff\x51", raw):
        _judge_tiles(raw[match.end() : match.end() + 38])
    for count, match in enumerate(re.finditer(rb"\xff[\x52\x53]\0", raw)):
        num_blocks = _MAX_COMPONENTS * _count_blocks(raw[match.start() : match.start() + 48], size)
        if count > _MAX_COMPONENTS * _MAX_TILES or num_blocks > _MAX_BLOCKS:
            raise ImageError("too_large", f"over {_MAX_BLOCKS:,} code blocks")


def _judge_tiles(siz: bytes) -> None:
    """Raise ImageError for too many tiles or components; none for bytes that only look like a SIZ segment."""
    if len(siz) < 38:
        return
    length, right, bottom, _, _, width, height, left, top, num_components = struct.unpack(">H2x8IH", siz)
    if length != 38 + 3 * num_components or not width or not height:
        return
    if num_components > _MAX_COMPONENTS:
        raise ImageError("too_large", f"{num_components:,} components")
    if -(-(right - left) // width) * -(-(bottom - top) // height) > _MAX_TILES:
        raise ImageError("too_large", f"over {_MAX_TILES:,} tiles")


def _count_blocks(segment: bytes, size: tuple[int, int]) -> int:
    """How many code blocks a COD or COC segment makes of a component; none of bytes that only look like one.

    Section B.7: a block lies within a precinct, and a band of all levels but the first has half its size.
    """
    segment = segment.ljust(48, b"\0")
    at, style = (9, segment[4]) if segment[1] == 0x52 else (6, segment[5])
    levels, *sides = segment[at : at + 3]
    precincts = segment[at + 5 : at + 6 + levels] if style & 1 else b""
    if segment[3] != at + 3 + len(precincts) or levels > 32 or max(sides) > 8:
        return 0
    num_blocks = 0
    for level, precinct in enumerate(precincts or b"\xff" * (levels + 1)):
        is_half = int(level > 0)
        shifts = [
            levels - level + is_half + min(side + 2, max(0, room - is_half))
            for side, room in zip(sides, (precinct & 15, precinct >> 4), strict=True)
        ]
        across, down = (-(-length >> shift) for length, shift in zip(size, shifts, strict=True))
        num_blocks += (3 if is_half else 1) * across * down
    return num_blocks

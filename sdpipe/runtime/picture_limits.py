"""What a picture may cost, judged by its head before its pixels are decoded.

H, W: height and width. The times are of one core of an AMD EPYC, Pillow 13.
"""

import io
import math
import re

from PIL import Image, ImageFile

from sdpipe.errors import ImageError
from sdpipe.runtime.jpeg_2000_limits import judge_jpeg_2000
from sdpipe.runtime.tiff_limits import is_tiff, judge_tiff

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
_MAX_BYTES_A_DEEP_PIXEL = 18  # three times five digits and a space
_MAX_COMMENTS = 1000  # of a plain PPM; each copies up to a megabyte

# A scan of a progressive JPEG goes over all of the picture again, at 0.2 to 4 nanoseconds a pixel. Encoders
# write 10, or 18 for CMYK; small pictures may have 600.
_MAX_SCANNED = 20 * MAX_PIXELS
_LEAST_SCANNED = 2**21
_MAX_PROGRESSIVE_BYTES = 2**25  # 32 nanoseconds a byte
_JPEG_MARK = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd7\xff]")  # those that a length follows, and start and end
_MAX_FILL = b"\xff" * 2**18  # before a mark; libjpeg goes over it again and again, 16 MiB in 3 s

# Pillow reads a PNG, a GIF, and the heads of other formats, part by part, at 0.1 to 1 microseconds a read, of
# which a part takes 2 to 5. libpng's parts have 8 KiB, so that 32,000 fill the largest file that is read.
_MAX_READS = 500_000

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
    if is_tiff(raw):
        judge_tiff(raw)
        stream.bytes_left = math.inf  # also what other programs keep in its tags, such as layers
    image = Image.open(stream, formats=formats)
    stream.bytes_left = math.inf
    image.tile = [_in_c(tile) for tile in image.tile]
    if _judge_head(image, raw):
        stream.reads_left = math.inf  # these read byte by byte, within limits of their own
    return image


def _in_c(tile: ImageFile._Tile) -> ImageFile._Tile:
    """Of a binary PPM in 16 bits, the upper 8, as of other formats; Pillow rounds them, in Python."""
    is_deep = tile.codec_name == "ppm" and _has_deep_colours(tile)
    return tile._replace(codec_name="raw", args="RGB;16B") if is_deep else tile


def is_deep_plain(image: ImageFile.ImageFile) -> bool:
    """Whether it is a plain text PPM with 16 bits a colour."""
    return any(tile.codec_name == "ppm_plain" and _has_deep_colours(tile) for tile in image.tile)


def _has_deep_colours(ppm_tile: ImageFile._Tile) -> bool:
    return ppm_tile.args == ("RGB", 65535)


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
    bytes_a_pixel = _MAX_BYTES_A_DEEP_PIXEL if is_deep_plain(image) else _MAX_BYTES_A_PIXEL
    if in_python and len(raw) > bytes_a_pixel * num_pixels + _HEAD_BYTES:
        raise ImageError("too_large", f"{len(raw):,} bytes for {width} x {height} pixels")
    if "ppm_plain" in codecs and raw.count(b"#") > _MAX_COMMENTS:
        raise ImageError("too_large", f"over {_MAX_COMMENTS:,} comments")
    if "jpeg" in codecs:
        _judge_scans(image, raw)
    if "jpeg2k" in codecs:
        judge_jpeg_2000(image.size, raw)
    return in_python


def _read_marks(raw: bytes) -> tuple[int, int]:
    """Scans of a JPEG, and its end; what stands behind that, such as a phone's film, is not decoded.

    Segments are passed over by their length, as libjpeg does: what they hold may look like marks.
    """
    num_scans, at = 0, 2
    for _ in range(_MAX_READS):
        mark = _JPEG_MARK.search(raw, at)
        if mark is None or mark[0] == b"\xff\xd9":
            return num_scans, len(raw) if mark is None else mark.end()
        num_scans += mark[0] == b"\xff\xda"
        at = mark.end() + int.from_bytes(raw[mark.end() : mark.end() + 2])
    raise ImageError("too_large", f"over {_MAX_READS:,} segments")


def _judge_scans(image: ImageFile.ImageFile, raw: bytes) -> None:
    """Raise ImageError for a JPEG of too many scans or fill bytes, or too many bytes if it is progressive."""
    width, height = image.size
    num_scans, end = _read_marks(raw)
    if num_scans * max(width * height, _LEAST_SCANNED) > _MAX_SCANNED:
        raise ImageError("too_large", f"{num_scans:,} scans of {width} x {height} pixels")
    if raw.find(_MAX_FILL, 0, end) >= 0:
        raise ImageError("too_large", f"over {len(_MAX_FILL):,} bytes of filling")
    if "progressive" in image.info and len(raw) > _MAX_PROGRESSIVE_BYTES:
        raise ImageError("too_large", f"a progressive JPEG of over {_MAX_PROGRESSIVE_BYTES // 2**20} MiB")

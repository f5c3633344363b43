"""What a picture may cost, judged by its head before its pixels are decoded.

H, W: height and width. The times are of one core of an AMD EPYC, Pillow 13.
"""

import io
from collections.abc import Iterator

from PIL import Image, ImageFile

from sdpipe.errors import ImageError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before their pixels are decoded (192 MB as RGB)."""

_MAX_PIXELS_OF = {"JPEG2000": 32_000_000, "WEBP": 48_000_000}  # 24 and 16 bytes a pixel while decoding

# Decoders of Pillow's that are written in Python (QOI, plain and odd PPM, run lengths in BMP) take up to 0.9
# microseconds a pixel, and 0.2 a byte that makes none. Full HD is 2,073,600 pixels.
_MAX_PIXELS_IN_PYTHON = 2_100_000
_MAX_BYTES_A_PIXEL = 12
_MAX_COMMENTS = 1000  # of a plain PPM; each copies up to a megabyte

# A scan of a progressive JPEG goes over all of the picture again, at 0.2 to 4 nanoseconds a pixel. Encoders
# write 10, or 18 for CMYK; small pictures may have 600.
_MAX_SCANNED = 20 * MAX_PIXELS
_LEAST_SCANNED = 2**21

# Pillow reads the head of a JPEG and all of a PNG part by part, at 0.7 and 1.8 microseconds each. libpng's
# have 8 KiB, so that 32,000 fill the largest file that is read.
_MAX_PARTS = 100_000

_HEAD_BYTES = 2**16
_MAX_ICON_BYTES = 2**23
_PNG = b"\x89PNG\r\n\x1a\n"


def judge_bytes(raw: bytes) -> None:
    """Raise ImageError for what Pillow would be long about before it says how large the picture is."""
    if is_icon(raw):
        if len(raw) > _MAX_ICON_BYTES:
            raise ImageError("too_large", f"an icon of over {_MAX_ICON_BYTES // 2**20} MiB")
        judge_head(_inside(raw), raw)
    if raw[:1] == b"P" and raw[1:2] in b"0123456fy" and len(raw) > _HEAD_BYTES:
        # Pillow reads the head of a PPM byte by byte, and it may have comments of any length.
        Image.open(io.BytesIO(raw[:_HEAD_BYTES]), formats=("PPM",))
    for num_parts, _ in enumerate(_parts(raw)):
        if num_parts == _MAX_PARTS:
            raise ImageError("too_large", f"over {_MAX_PARTS:,} parts")


def _parts(raw: bytes) -> Iterator[int]:
    """Where each chunk of a PNG begins, each segment in the head of a JPEG, or byte between them."""
    at = 8 if raw.startswith(_PNG) else 2
    if at == 8:
        while at + 8 <= len(raw):
            yield at
            at += 12 + int.from_bytes(raw[at : at + 4])
    elif raw.startswith(b"\xff\xd8"):
        while at + 4 <= len(raw) and raw[at : at + 2] != b"\xff\xda":
            yield at
            has_length = raw[at] == 0xFF and 0xC0 <= raw[at + 1] < 0xFF and not 0xD0 <= raw[at + 1] <= 0xD9
            at += 2 + int.from_bytes(raw[at + 2 : at + 4]) if has_length else 1


def is_icon(raw: bytes) -> bool:
    """Whether Pillow takes it for an ICO file, which it decodes while opening it."""
    return raw.startswith(b"\0\0\1\0")


def _inside(raw: bytes) -> ImageFile.ImageFile:
    """The picture of an icon that Pillow decodes, opened."""
    from PIL import BmpImagePlugin, IcoImagePlugin, PngImagePlugin  # few pictures are icons

    stream = io.BytesIO(raw)
    stream.seek(IcoImagePlugin.IcoFile(stream).entry[0].offset)
    is_png = raw.startswith(_PNG, stream.tell())
    return PngImagePlugin.PngImageFile(stream) if is_png else BmpImagePlugin.DibImageFile(stream)


def judge_head(image: ImageFile.ImageFile, raw: bytes) -> None:
    """Raise ImageError for an opened picture that would take too much time or memory to decode."""
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
    num_scans = raw.count(b"\xff\xda") if "jpeg" in codecs else 0  # coded pixels do not hold these bytes
    if num_scans * max(num_pixels, _LEAST_SCANNED) > _MAX_SCANNED:
        raise ImageError("too_large", f"{num_scans:,} scans of {width} x {height} pixels")

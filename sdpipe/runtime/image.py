"""The one image decoder: training on folders, evaluation and prediction see the same pixels.

H, W: height and width; C: channels, 1 (grey) or 3 (RGB).
"""

import logging
import os
import stat
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sdpipe.errors import ImageError
from sdpipe.runtime.picture_limits import MAX_PIXELS, is_icon, judge_exif, open_within_limits
from sdpipe.runtime.pixel_modes import load, to_mode

MAX_BYTES = 256 * 1024 * 1024
"""Larger files are refused before they are read."""

_LARGE_PIXELS, _LARGE_BYTES = 2**22, 2**23

FORMATS = (
    "PNG", "JPEG", "GIF", "BMP", "DIB", "PPM",  # Pillow knows these without loading all of its plugins
    "AVIF", "ICO", "JPEG2000", "PCX", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
"""Pillow's names of the formats that are read. Left out: those that start another program (EPS), are
documents or videos, or only hand on to another library."""

_TURNINGS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; 1 and what is no orientation need nothing. TIFF 6.0, section 8."""

# What Pillow's decoders raise on damaged files, seen over its own test corpus; none of it is our bug,
# since nothing but Pillow runs inside the try block.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AssertionError,
    AttributeError,
    NotImplementedError,
    struct.error,
    RuntimeError,
)

# Pictures between Pillow's two thresholds warn; they are refused here by MAX_PIXELS. Damaged EXIF warns, too.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of them would go to standard error


def image_suffixes() -> frozenset[str]:
    """File name endings of the formats that are read, in lower case with the dot."""
    Image.init()
    kinds = (*FORMATS, "MPO")  # a JPEG with more pictures behind it
    return frozenset(ending for ending, kind in Image.EXTENSION.items() if kind in kinds)


Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in pixels of a picture."""


def decode(
    source: Path | bytes, channels: int, size_HW: tuple[int, int] | None, crop_fraction: float = 1.0
) -> np.ndarray:
    """Read one picture as uint8 pixels, shape (H, W, channels), as evaluation and prediction see it.

    With `size_HW` the box of `centre_box` is cut out and resized; a picture that is this box and size already
    is left as it is. Raises ImageError with a code and a reason.
    """
    with Turn() as turn:
        image = open_picture(source, channels, turn)
        if size_HW is None:
            return _pixels(image)
        return cut(image, centre_box((image.height, image.width), size_HW, crop_fraction), size_HW)


class Turn:
    """Held while a picture is decoded and cut: of several threads, one at a time has a large one."""

    _lock = threading.Lock()

    def __enter__(self) -> "Turn":
        self._is_held = False
        return self

    def take(self) -> None:
        """Wait until no other thread has a large picture."""
        if not self._is_held:
            self._is_held = self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        if self._is_held:
            self._lock.release()


def open_picture(source: Path | bytes, channels: int, turn: Turn | None = None) -> Image.Image:
    """Read one picture whole, of mode L (1 channel) or RGB.

    turn: taken before a large picture.

    The EXIF orientation is applied, transparency is laid over white, 16 bits give their upper 8,
    an animation gives its first frame. Raises ImageError with a code and a reason.
    """
    raw = source if isinstance(source, bytes) else _read(source, turn)
    if not raw:
        raise ImageError("empty", "the file is empty")
    return _decode(raw, "L" if channels == 1 else "RGB", turn)


def centre_box(picture_HW: tuple[int, int], size_HW: tuple[int, int], crop_fraction: float) -> Box:
    """The largest centred box of the aspect ratio of `size_HW`, its sides taken times `crop_fraction`.

    With 224 / 256 it is what resizing the shorter side to 256 and cutting out 224 x 224 keeps.
    """
    (picture_height, picture_width), (height, width) = picture_HW, size_HW
    scale = min(picture_width / width, picture_height / height) * crop_fraction
    # Rounding must not make a side longer than the picture's, or an edge would lie outside.
    box_width, box_height = min(width * scale, picture_width), min(height * scale, picture_height)
    left, top = (picture_width - box_width) / 2, (picture_height - box_height) / 2
    return (left, top, min(left + box_width, picture_width), min(top + box_height, picture_height))


def cut(image: Image.Image, box: Box, size_HW: tuple[int, int]) -> np.ndarray:
    """Cut a box out and resize it (bilinear, antialiased): uint8 (H, W, C)."""
    height, width = size_HW
    whole: Box = (0, 0, width, height)
    if image.size == (width, height) and box == whole:
        return _pixels(image)
    # Cropping inside resize() bounds the work: a 1 x 1,000,000 strip is never blown up.
    return _pixels(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, len(image.getbands()))


def _read(path: Path, turn: Turn | None) -> bytes:
    try:
        _check_regular(path.stat())
        # Not blocking: a file may have become a pipe since, and some of /proc wait for what comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            _check_regular(status)
            check_size(status.st_size)
            if turn is not None and status.st_size > _LARGE_BYTES:
                turn.take()
            raw = stream.read(status.st_size)  # of a file that grows, what there was
    except FileNotFoundError as error:
        raise ImageError("not_found", "no such file") from error
    except PermissionError as error:
        raise ImageError("no_permission", "no permission to read it") from error
    except MemoryError as error:
        raise ImageError("no_memory", "not enough memory to read it") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ImageError("unreadable", f"cannot be read: {error}") from error
    return raw or b""


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is_a_folder", "is a folder, expected a picture")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not_a_file", "is no regular file, expected a picture")


def check_size(num_bytes: int) -> None:
    """Raise ImageError for more than MAX_BYTES."""
    if num_bytes > MAX_BYTES:
        raise ImageError("too_large", f"is over {MAX_BYTES // 2**20} MiB")


def _decode(raw: bytes, mode: str, turn: Turn | None) -> Image.Image:
    try:
        if turn is not None and is_icon(raw):
            turn.take()
        opened = open_within_limits(raw, FORMATS)
        if turn is not None and opened.width * opened.height > _LARGE_PIXELS:
            turn.take()
        image = load(opened, raw)
        judge_exif(opened)
        turning = _turning(image)
        image = to_mode(image, mode)
        return image if turning is None else image.transpose(turning)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"over {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", "not a picture in a format that is read") from error
    except MemoryError as error:
        raise ImageError("no_memory", "not enough memory to decode its pixels") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError("damaged", f"damaged or unsupported picture: {reason}") from error


def _turning(image: Image.Image) -> Image.Transpose | None:
    """Not ImageOps.exif_transpose, which also writes all of the EXIF data again, however much it is.

    Data that are none say nothing of the orientation; of JPEG Pillow takes them so by itself.
    """
    try:
        return _TURNINGS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, struct.error):  # no TIFF file, text of no hexadecimal digits
        return None

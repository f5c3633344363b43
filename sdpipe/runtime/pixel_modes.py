"""From any mode of Pillow's to 8 bits of grey (L) or of colours (RGB), without losing range, over white."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageFile

from sdpipe.errors import ImageError
from sdpipe.runtime.picture_limits import is_deep_plain

_STRIP_PIXELS = 2**20
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # between the grey values of a PNG with fewer bits, as it is decoded
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2

# What Pillow raises where it cannot convert a damaged picture.
_FAILURES = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError,
    NotImplementedError,
)  # fmt: skip


def load(image: ImageFile.ImageFile, raw: bytes) -> Image.Image:
    """Decode an opened picture's pixels, in whatever mode keeps all of them.

    raw: the file. Raises ImageError for a transparent colour that the decoded pixels no longer tell apart,
    and what Pillow raises for a damaged file.
    """
    if is_deep_plain(image):
        return _load_deep_plain(image, raw)
    key = image.info.get("transparency")
    coded = image.tile[0].args if image.format == "PNG" and image.tile and key is not None else None
    if coded == "RGB;16B":
        raise ImageError("unsupported_mode", "a transparent colour of 16 bits; convert it to 8 bits")
    image.load()
    if isinstance(key, int) and coded in _GREY_STEPS:
        step = _GREY_STEPS[coded]
        image.info["transparency"] = key % (255 // step + 1) * step  # the upper bits are to be passed over
    elif key is None and image.format == "PNG":
        image.info.pop("transparency", None)  # one behind the pixels, where none may stand
    return image


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Bring a loaded picture to `L` or `RGB`: the upper 8 bits, what is transparent over white.

    Raises ImageError for pixels that have no agreed range or cannot be converted, and for lack of memory.
    """
    if image.mode == "F":
        raise ImageError(
            "unsupported_mode", "floating-point pixels have no agreed range; convert it to 8 bits"
        )
    try:
        if image.mode.startswith("I"):  # I;16 and its like, or I, 32 bits
            image = _in_strips(image, "L", _deep_to_eight(image))
        if image.has_transparency_data:
            return _in_strips(image, mode, lambda strip: _over_white(strip).convert(mode))
        if image.mode == "LAB":
            image = image.convert("RGB")  # from where alone there is a way to grey
        return image if image.mode == mode else image.convert(mode)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("no_memory", "not enough memory to convert its pixels") from error
    except _FAILURES as error:
        raise ImageError(
            "unsupported_mode", f"pixels of mode {image.mode} cannot be converted: {error}"
        ) from error


def _load_deep_plain(image: ImageFile.ImageFile, raw: bytes) -> Image.Image:
    """The upper 8 bits of a plain text PPM, read as grey of three times the width; Pillow rounds colours."""
    head = b"P2 %d %d 65535\n" % (3 * image.width, image.height)
    grey = Image.open(io.BytesIO(head + raw[image.tile[0].offset :]), formats=("PPM",))
    values_HW = np.asarray(_in_strips(grey, "L", _deep_to_eight(grey)))
    return Image.fromarray(values_HW.reshape(image.height, image.width, 3))


def _in_strips(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Change a picture a strip of rows at a time, so that what stands between takes no memory to speak of."""
    changed = Image.new(mode, image.size)
    num_rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        strip = image.crop((0, top, image.width, min(top + num_rows, image.height)))
        changed.paste(change(strip), (0, top))
    return changed


def _over_white(image: Image.Image) -> Image.Image:
    overlay = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", overlay.size, "white"), overlay)


def _deep_to_eight(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes 8 bits of grey of strips of a picture with more, as its file says."""
    tags = getattr(image, "tag_v2", {})  # of TIFF alone
    (num_bits, *_) = tags.get(_BITS, (16,))
    if num_bits == 16 and _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise ImageError("unsupported_mode", "pixels with a sign have no agreed range; convert it to 8 bits")
    num_bits = min(num_bits, 16)  # of 32 what 16 hold
    is_negative = bool(tags) and tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
    return partial(
        _upper_eight, num_bits=num_bits, is_negative=is_negative, key=image.info.get("transparency")
    )


def _upper_eight(strip: Image.Image, *, num_bits: int, is_negative: bool, key: int | None) -> Image.Image:
    """key: the value that is transparent, of a PNG, which becomes white."""
    # convert("L") would saturate at 255. Of colours Pillow takes the upper 8 bits, too.
    values_HW = np.asarray(strip).astype(np.int64)
    highest = 2**num_bits - 1
    if values_HW.size and (values_HW.min() < 0 or values_HW.max() > highest):
        raise ImageError("unsupported_mode", f"grey values outside 0..{highest}; convert it to 8 or 16 bits")
    grey_HW = (highest - values_HW if is_negative else values_HW) >> (num_bits - 8)
    if key is not None:
        grey_HW[values_HW == key] = 255
    return Image.fromarray(grey_HW.astype(np.uint8))

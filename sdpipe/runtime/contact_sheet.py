"""One picture that shows many: each with its label and probability, or why there is none."""

import math
import textwrap
import unicodedata
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sdpipe.runtime.predictor import THUMBNAIL_SIDE, Prediction
from sdpipe.runtime.sources import Failure

_SOFTWARE = "sdpipe contact sheet"
_GAP, _CAPTION, _MAX_COLUMNS = 12, 40, 10
_CELL_WIDTH, _CELL_HEIGHT = THUMBNAIL_SIDE + _GAP, THUMBNAIL_SIDE + _CAPTION + _GAP


class ContactSheet:
    """Collects the first `limit` results, then draws them in a grid, in input order."""

    limit = 60

    def __init__(self) -> None:
        self._shown: list[Prediction | Failure] = []
        self._num_left_out = 0

    def add(self, result: Prediction | Failure) -> None:
        """Show this result, too, or count it."""
        if len(self._shown) < self.limit:
            self._shown.append(result)
        else:
            self._num_left_out += 1

    def draw(self) -> Image.Image:
        """The sheet, RGB."""
        num_columns = min(max(3, math.ceil(math.sqrt(len(self._shown) * 1.5))), _MAX_COLUMNS)
        num_rows = max(1, math.ceil(len(self._shown) / num_columns))
        footer = _CAPTION if self._num_left_out else 0
        size = (_GAP + num_columns * _CELL_WIDTH, _GAP + num_rows * _CELL_HEIGHT + footer)
        sheet = Image.new("RGB", size, "white")
        for at, result in enumerate(self._shown):
            corner = (_GAP + at % num_columns * _CELL_WIDTH, _GAP + at // num_columns * _CELL_HEIGHT)
            _draw_tile(sheet, corner, result)
        if self._num_left_out:
            note = f"and {self._num_left_out:,} more, not shown"
            ImageDraw.Draw(sheet).text((_GAP, size[1] - footer), note, "black", _font(16))
        return sheet

    def save(self, path: Path) -> None:
        """Write it as PNG, marked as ours. Raises OSError."""
        mark = PngInfo()
        mark.add_text("Software", _SOFTWARE)
        self.draw().save(path, "PNG", pnginfo=mark)


def is_contact_sheet(path: Path) -> bool:
    """Whether a file is a sheet that may be drawn anew, and not somebody's picture."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return bool(image.info.get("Software") == _SOFTWARE)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _draw_tile(sheet: Image.Image, corner: tuple[int, int], result: Prediction | Failure) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    below = top + THUMBNAIL_SIDE + 3
    if isinstance(result, Failure):
        draw.rectangle((left, top, left + THUMBNAIL_SIDE - 1, top + THUMBNAIL_SIDE - 1), "#b8b8b8")
        num_letters = int((THUMBNAIL_SIDE - 16) / _font(13).getlength("n"))
        lines = textwrap.wrap(_printable(result.message), num_letters)[:7]
        draw.multiline_text((left + 8, top + 8), "\n".join(lines), "#303030", _font(13))
    else:
        if result.thumbnail is not None:
            image = _enlarged(result.thumbnail)
            offset = ((THUMBNAIL_SIDE - image.width) // 2, (THUMBNAIL_SIDE - image.height) // 2)
            sheet.paste(image, (left + offset[0], top + offset[1]))
        label, probability = result.top[0]
        number = f"{probability:.1%}"
        room = THUMBNAIL_SIDE - _font(15).getlength(f" {number}")
        draw.text((left, below), f"{_fit(_printable(label), 15, room)} {number}", "black", _font(15))
    name = _fit(_printable(Path(result.file).name or result.file), 12, THUMBNAIL_SIDE)
    draw.text((left, below + 19), name, "#606060", _font(12))


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures in whole multiples, so that their pixels stay what they are."""
    factor = max(1, THUMBNAIL_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu, which has many scripts, where the system has it; else Pillow's own, which has ASCII."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return ImageFont.load_default(size)


def _fit(text: str, size: int, width: float) -> str:
    if _font(size).getlength(text) <= width:
        return text
    while text and _font(size).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _printable(text: str) -> str:
    """With escapes for what the font lacks: two classes must not look alike."""
    return "".join(map(_drawn, unicodedata.normalize("NFC", text)[:200]))


@cache
def _drawn(letter: str) -> str:
    font = _font(15)
    lacking = "\uffff"  # no letter, and drawn as whatever the font lacks
    if letter.isprintable() and (
        letter.isascii() or bytes(font.getmask(letter)) != bytes(font.getmask(lacking))
    ):
        return letter
    return letter.encode("unicode_escape").decode()

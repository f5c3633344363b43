"""Names on a contact sheet, and files that it may be written to."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from encoded_pictures import png, write_folder
from PIL import ImageFont
from test_predict_use import call

from sdpipe.runtime import contact_sheet
from sdpipe.runtime.contact_sheet import _drawn, _font, _printable, is_contact_sheet

NAMES = ("Müll", "Mull", "猫", "犬", "кот", "лес", "Straße", "Strase", "a\n", "a\x1b", "ok & 1")


@pytest.fixture(params=["DejaVu", "Pillow's own"])
def font(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The one that the system has, or the one that is always there."""
    truetype: Callable[..., Any] = ImageFont.truetype

    def lacking(name: Any, *arguments: Any, **keywords: Any) -> Any:
        if name == "DejaVuSans.ttf":
            raise OSError("cannot open resource")
        return truetype(name, *arguments, **keywords)

    if request.param != "DejaVu":
        monkeypatch.setattr(contact_sheet.ImageFont, "truetype", lacking)
    for cached in (_font, _drawn):
        cached.cache_clear()
    yield request.param
    for cached in (_font, _drawn):
        cached.cache_clear()


def test_two_classes_do_not_look_alike(font: str) -> None:
    """Whatever letters the font lacks: accents were left off, and other scripts were question marks."""
    drawn = [bytes(_font(15).getmask(_printable(name))) for name in NAMES]
    assert len(set(drawn)) == len(NAMES)
    assert [_printable(name) for name in NAMES[-3:]] == ["a\\n", "a\\x1b", "ok & 1"]


def test_a_picture_of_any_size_is_no_contact_sheet(tmp_path: Path) -> None:
    """Pillow has an exception of its own for one that claims more pixels than it opens."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png(struct.pack(">2I5B", 50_000, 50_000, 8, 0, 0, 0, 0), b""))
    assert not is_contact_sheet(path)


def test_a_sheet_that_cannot_be_written_is_said_before_the_first_picture(
    tmp_path: Path, rgb_model_path: Path
) -> None:
    folder = write_folder(tmp_path / "pictures")
    result = call(folder / "0.png", "--model", rgb_model_path, "--show", "/proc/sheet.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: [Errno 2] No such file or directory: '/proc/sheet.png'\n"

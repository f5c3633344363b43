"""Names on a contact sheet."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import ImageFont

from sdpipe.runtime import contact_sheet
from sdpipe.runtime.contact_sheet import _drawn, _font, _printable

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

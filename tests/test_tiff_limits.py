"""Strips, tiles and directories of TIFF files and EXIF data are counted before they are decoded."""

import struct
import zlib

import pytest
from test_picture_limits import refusal

from sdpipe.runtime.image import decode


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

"""What a TIFF may cost, judged by its tags before Pillow and libtiff see it.

TIFF 6.0, section 2; BigTIFF has 8 bytes for what TIFF has 4 or 2. The times are of one core of an AMD EPYC.
"""

import struct

import numpy as np

from sdpipe.errors import ImageError

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


def is_tiff(raw: bytes) -> bool:
    """Whether Pillow takes it for a TIFF."""
    return raw.startswith(_TIFF)


def judge_tiff(raw: bytes) -> None:
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

    What is cut off is left out. Raises
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

"""What a JPEG 2000 picture may cost, judged by its marker segments before OpenJPEG sees it.

The times are of one core of an AMD EPYC.
"""

import re
import struct

from sdpipe.errors import ImageError

# Of JPEG 2000, a byte takes 0.12 microseconds, a tile 10 KB of memory, and a code block 500 bytes, even an
# empty one. Encoders write blocks of 64 x 64; the smallest are 1 x 1.
_MAX_JPEG_2000_BYTES = 2**24
_MAX_BLOCKS = 2**17
_MAX_TILES = 2**13
_MAX_COMPONENTS = 4


def judge_jpeg_2000(size: tuple[int, int], raw: bytes) -> None:
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

"""What a JPEG 2000 file asks a decoder to do is counted before it does it."""

import struct

import numpy as np
from encoded_pictures import encoded, pixels
from PIL import Image
from test_picture_limits import JPEG_2000, refusal

from sdpipe.runtime.image import decode


def jpeg_2000(
    size: int,
    *,
    block: int = 4,
    levels: int = 5,
    precinct: int = 15,
    tile: int | None = None,
    components: int = 1,
) -> bytes:
    """A grey square in which nothing is coded: JP2 boxes, one of no use, and a codestream.

    block, precinct: binary logarithms of their sides, that of a block less 2, as they stand in the file.
    """

    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">2BH", 0xFF, marker, len(content) + 2) + content

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    part = tile or size
    siz = struct.pack(">H8IH", 0, size, size, 0, 0, part, part, 0, 0, components) + b"\7\1\1" * components
    precincts = bytes([precinct * 17]) * (levels + 1)
    cod = struct.pack(">2BHB5B", 1, 0, 1, 0, levels, block, block, 0, 1) + precincts
    qcd = b"\x40" + b"\x48" * (3 * levels + 1)
    stream = b"\xff\x4f" + segment(0x51, siz) + segment(0x52, cod) + segment(0x5C, qcd)
    stream += (
        b"\xff\x90" + struct.pack(">2HI2B", 10, 0, 14 + 64, 0, 1) + b"\xff\x93" + bytes(64) + b"\xff\xd9"
    )
    head = box(b"ihdr", struct.pack(">2IH4B", size, size, 1, 7, 7, 0, 0)) + box(b"colr", b"\1\0\0\0\0\0\x11")
    return (
        JPEG_2000[:12] + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", head) + box(b"free", b"")
        + box(b"jp2c", stream)
    )  # fmt: skip


def test_code_blocks_tiles_and_components_of_jpeg_2000_are_counted() -> None:
    """166 bytes took 5 GiB with nine million precincts, 3 KB as much with 1,000 components in 5,000 tiles."""
    assert str(refusal(jpeg_2000(5600, block=0))) == "over 131,072 code blocks"
    assert str(refusal(jpeg_2000(3000, precinct=1))) == "over 131,072 code blocks"
    assert str(refusal(jpeg_2000(2000, precinct=0, levels=0))) == "over 131,072 code blocks"
    assert str(refusal(jpeg_2000(1000, tile=10))) == "over 8,192 tiles"
    assert str(refusal(jpeg_2000(1000, tile=100, components=1000))) == "1,000 components"
    for size, options in ((500, {"block": 0}), (500, {"precinct": 3}), (500, {"tile": 10}), (2000, {})):
        assert decode(jpeg_2000(size, **options), 1, None).shape == (size, size, 1)
    kept = Image.fromarray(pixels(150, 200))
    for options in ({"codeblock_size": (4, 4)}, {"precinct_size": (128, 128)}, {"tile_size": (64, 64)}):
        raw = encoded(kept, "JPEG2000", irreversible=False, **options)
        np.testing.assert_array_equal(decode(raw, 3, None), np.asarray(kept))


def test_changes_of_the_coding_style_count_wherever_they_stand() -> None:
    """A tile may have blocks of its own; one component, too."""
    raw, at = jpeg_2000(3000), jpeg_2000(3000).index(b"\xff\x93")
    for segment in (b"\x52\0\x0c\0\0\0\1\0\5\0\0\0\1", b"\x53\0\x09\0\0\5\0\0\0\1"):
        assert str(refusal(raw[:at] + b"\xff" + segment + raw[at:])) == "over 131,072 code blocks"

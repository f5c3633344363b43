"""What is no picture, too much of one, or not there any more."""

import os
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from encoded_pictures import encoded, pixels
from PIL import Image

from sdpipe.errors import ImageError
from sdpipe.runtime import image as image_module
from sdpipe.runtime import picture_limits
from sdpipe.runtime.image import decode


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "empty"),
        (b"hello", "not_an_image"),
        (encoded(Image.new("RGB", (64, 64), 3))[:60], "damaged"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), "unsupported_mode"),
    ],
)
def test_bad_bytes_have_a_code_and_a_reason(raw: bytes, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(raw, 3, (8, 8))
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    for name, code in (
        ("folder.png", "is_a_folder"),
        ("pipe.png", "not_a_file"),
        ("nothing.png", "not_found"),
    ):
        with pytest.raises(ImageError) as caught:
            decode(tmp_path / name, 3, (8, 8))
        assert caught.value.code == code
    with pytest.raises(ImageError):
        decode(Path("a\0b"), 3, (8, 8))


def test_a_decompression_bomb_is_refused_before_its_pixels_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of 100,000 x 100,000 pixels is a few kilobytes; its header is enough to refuse it."""
    small = encoded(Image.new("L", (1, 1)))
    chunk = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + small[24:29]
    bomb = small[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + small[33:]
    with pytest.raises(ImageError) as caught:
        decode(bomb, 1, (8, 8))
    assert caught.value.code == "too_large"
    monkeypatch.setattr(picture_limits, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="10 x 10 pixels"):
        decode(encoded(Image.new("L", (10, 10))), 1, (8, 8))


def test_a_file_that_grows_is_read_as_it_was(tmp_path: Path) -> None:
    """While a thread appends to it without end, reading comes to an end, and the picture is what it was."""
    array = pixels(300, 300)
    path = tmp_path / "growing.bmp"
    path.write_bytes(encoded(Image.fromarray(array), "BMP"))
    stop = threading.Event()

    def grow() -> None:
        with path.open("ab") as stream:
            while not stop.is_set() and stream.tell() < 2**27:
                stream.write(b"x" * 2**16)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _ in range(20):
            np.testing.assert_array_equal(decode(path, 3, None), array)
    finally:
        stop.set()
        writer.join()


def test_sockets_devices_and_endless_files(tmp_path: Path) -> None:
    """None is waited for; a file of nothing but holes over the limit is refused unread."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
        with (tmp_path / "huge.png").open("wb") as stream:
            stream.truncate(image_module.MAX_BYTES + 1)
        (tmp_path / "loop.png").symlink_to("loop.png")
        for name, code in (
            (tmp_path / "socket.png", "not_a_file"),
            (Path("/dev/zero"), "not_a_file"),
            (tmp_path / "huge.png", "too_large"),
            (tmp_path / "loop.png", "unreadable"),
            (tmp_path / ("x" * 300), "unreadable"),
        ):
            with pytest.raises(ImageError) as caught:
                decode(name, 3, (8, 8))
            assert caught.value.code == code, name
            assert "\n" not in str(caught.value)


def test_a_file_that_becomes_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and opening."""
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.setattr(Path, "is_file", lambda _path: True)
    with pytest.raises(ImageError, match="no regular file"):
        decode(tmp_path / "pipe.png", 3, (8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["iCCP", "zTXt", "iTXt"])
def test_chunks_that_unfold_to_gigabytes_are_refused(kind: str) -> None:
    """1 GiB of zeros in a chunk of a megabyte, where a profile or a text stands."""
    small = encoded(Image.new("L", (9, 9)))
    packer = zlib.compressobj(1)
    zeros = b"".join(packer.compress(bytes(2**24)) for _ in range(64)) + packer.flush()
    content = kind.encode() + b"k\0" + {"iCCP": b"\0", "zTXt": b"\0", "iTXt": b"\1\0\0\0"}[kind] + zeros
    chunk = (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    with pytest.raises(ImageError, match="Decompressed data too large"):
        decode(small[:33] + chunk + small[33:], 1, None)


def test_formats_that_take_more_memory_have_lower_limits() -> None:
    """OpenJPEG holds 24 bytes a pixel, WebP's and AVIF's 13 and more: they are refused by their heads."""
    raw = bytearray(encoded(Image.new("L", (16, 16)), "JPEG2000"))
    at = raw.index(b"ihdr") + 4
    raw[at : at + 8] = (6000).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match="6000 x 6000 pixels, at most 32,000,000"):
        decode(bytes(raw), 1, None)
    raw = bytearray(encoded(Image.new("L", (16, 16)), "AVIF"))
    at = raw.index(b"ispe") + 8
    raw[at : at + 8] = (7000).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match="7000 x 7000 pixels, at most 40,000,000"):
        decode(bytes(raw), 1, None)


@pytest.mark.slow
def test_large_pictures_are_decoded_one_at_a_time() -> None:
    """Eight threads with a large picture each take little more memory than one."""
    code = (
        "import io, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from PIL import Image\n"
        "from sdpipe.runtime.image import decode\n"
        "from sdpipe.runtime.memory import give_memory_back\n"
        "give_memory_back()\n"
        "stream = io.BytesIO()\n"
        "Image.new('RGBA', (2100, 2100), (1, 2, 3, 4)).save(stream, 'PNG')\n"
        "with ThreadPoolExecutor(int(sys.argv[1])) as pool:\n"
        "    list(pool.map(lambda _: decode(stream.getvalue(), 3, (8, 8)), range(8)))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    one, eight = (
        int(subprocess.run([sys.executable, "-c", code, number], capture_output=True, check=True).stdout)
        for number in ("1", "8")
    )
    assert eight < one + 25_000  # KiB; a picture alone is 17 MB, and another 17 while it is laid over white


@pytest.mark.slow
def test_the_largest_pictures_stay_within_a_gibibyte(tmp_path: Path) -> None:
    """64 megapixels, transparent, turned and 16-bit, by the whole command; each a process of its own."""
    turned = Image.Exif()
    turned[0x0112] = 6
    size = (8000, 8000)
    Image.new("RGBA", size, (9, 9, 9, 9)).save(tmp_path / "a.png", exif=turned, compress_level=1)
    Image.fromarray(np.full(size, 300, np.uint16)).save(tmp_path / "b.png", compress_level=1)
    Image.new("CMYK", size).save(tmp_path / "c.jpg")
    Image.new("RGB", size).save(tmp_path / "d.bmp")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sdpipe.runtime.image import decode\n"
        "decode(Path(sys.argv[1]), 3, (32, 32))\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    for path in sorted(tmp_path.iterdir()):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=True)
        assert int(done.stdout) < 900 * 1024, path.name  # onnxruntime and a model take 60 MiB beside it


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from sdpipe.errors import ImageError
from sdpipe.runtime.image import decode
raw = Path(sys.argv[1]).read_bytes()
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 60 * 2**20,) * 2)
for picture in (raw, Path(sys.argv[1])):
    try:
        decode(picture, 3, None)
    except ImageError as error:
        print(error.code, error)
"""


def test_too_little_memory_is_not_a_damaged_picture(tmp_path: Path) -> None:
    """7,000 x 7,000 pixels take 147 MB, and there are 60."""
    Image.new("RGB", (7000, 7000)).save(tmp_path / "big.png", compress_level=1)
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "big.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines() == [
        "no_memory not enough memory to decode its pixels",
        "no_memory not enough memory to decode its pixels",
    ]

import io
import os
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from sdpipe.errors import ImageError
from sdpipe.runtime import image as image_module
from sdpipe.runtime import picture_limits
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.image import decode


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(height: int = 6, width: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_the_same_pixels_in_any_lossless_encoding(kind: str) -> None:
    array = pixels()
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(array), kind), 3, None), array)


def test_grey_to_rgb_repeats_and_rgb_to_grey_is_luma() -> None:
    grey = pixels(channels=1)
    np.testing.assert_array_equal(
        decode(encoded(Image.fromarray(grey[..., 0])), 3, None), np.repeat(grey, 3, axis=2)
    )
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B of (10, 200, 30) is 123.81.
    assert decode(encoded(Image.new("RGB", (1, 1), (10, 200, 30))), 1, None).ravel().tolist() == [124]


def test_sixteen_bits_give_the_same_pixels_in_any_encoding() -> None:
    """The upper 8, of grey as of colours; a binary PPM of any size, since it is not decoded in Python."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 65536, (5, 7, 1), dtype=np.uint16)
    colours = rng.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    deep = Image.fromarray(grey[..., 0])
    files = [(grey, encoded(deep, kind)) for kind in ("PNG", "TIFF", "PPM")]
    files.append((grey, encoded(deep, "JPEG2000", irreversible=False)))
    for values, letter in ((colours, b"6"), (np.repeat(grey, 3, 2), b"6"), (grey, b"5")):
        files.append((values, b"P" + letter + b" 7 5 65535\n" + values.astype(">u2").tobytes()))
        plain = {b"6": b"P3", b"5": b"P2"}[letter]
        files.append(
            (values, plain + b" 7 5 # a comment\n65535\n" + " ".join(map(str, values.flat)).encode())
        )
        planes = values[::-1].transpose(2, 0, 1).astype(">u2").tobytes()  # SGI: planes, from below
        head = struct.pack(">H2B4H", 474, 0, 2, 3 if values.shape[2] == 3 else 2, 7, 5, values.shape[2])
        files.append((values, head.ljust(512, b"\0") + planes))
        files.append((values, deep_png(values)))
    for values, raw in files:
        expected = np.broadcast_to(values >> 8, (5, 7, 3))
        np.testing.assert_array_equal(decode(raw, 3, None), expected)
    assert decode(b"P6 2000 1100 65535\n" + bytes(6 * 2000 * 1100), 3, (8, 8)).max() == 0
    assert decode(b"P3 200 200 65535\n" + b"65535 " * 3 * 200 * 200, 3, None).min() == 255


def deep_png(values_HWC: np.ndarray) -> bytes:
    """A PNG in 16 bits, grey or RGB, which Pillow writes in grey only."""
    height, width, channels = values_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    kind = {1: 0, 3: 2}[channels]
    head = b"IHDR" + struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0)
    chunks = (head, b"IDAT" + zlib.compress(rows), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_sixteen_bit_grey_keeps_its_range() -> None:
    """65535 becomes 255 and 257 becomes 1, where Pillow's convert would saturate at 255."""
    values = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values)), 1, None).ravel().tolist() == [0, 1, 100, 255]


def test_exif_orientation_is_applied() -> None:
    array = pixels(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    turned = decode(encoded(Image.fromarray(array), "PNG", exif=exif), 3, None)
    np.testing.assert_array_equal(turned, np.rot90(array, -1))


def test_transparency_is_laid_over_white() -> None:
    """Half transparent black over white is (255 + 0) / 2; what is wholly transparent is not seen."""
    image = Image.new("RGBA", (2, 1))
    image.putpixel((0, 0), (0, 0, 0, 128))
    image.putpixel((1, 0), (255, 0, 0, 0))
    assert decode(encoded(image), 3, None).tolist() == [[[127, 127, 127], [255, 255, 255]]]


def test_palette_cmyk_and_animation() -> None:
    red = Image.new("RGB", (3, 3), (255, 0, 0))
    assert decode(encoded(red.quantize(2), "PNG"), 3, None)[0, 0].tolist() == [255, 0, 0]
    assert decode(encoded(red.convert("CMYK"), "TIFF"), 3, None)[0, 0].tolist() == [255, 0, 0]
    blue = Image.new("RGB", (3, 3), (0, 0, 255))
    animated = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decode(animated, 3, None)[0, 0].tolist() == [255, 0, 0]


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    array = pixels(8, 8)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(array)), 3, (8, 8)), array)


def test_others_are_resized_to_cover_and_cut_in_the_centre() -> None:
    """As Pillow resizes the whole of 16 x 8 to 8 x 4 and then cuts 4 x 4 out of its middle."""
    image = Image.fromarray(pixels(8, 16))
    whole = image.resize((8, 4), Image.Resampling.BILINEAR).crop((2, 0, 6, 4))
    np.testing.assert_array_equal(decode(encoded(image), 3, (4, 4)), np.asarray(whole))
    cut = image.crop((4, 0, 12, 8))
    np.testing.assert_array_equal(decode(encoded(image), 3, (8, 8)), np.asarray(cut))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_tiny_and_thin_pictures(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("L", size, 9)), 1, (8, 8)).tolist() == [[[9]] * 8] * 8


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


LOSSLESS = {
    "PNG": {}, "BMP": {}, "PPM": {}, "TGA": {}, "QOI": {}, "SGI": {}, "PCX": {},
    "ICO": {"bitmap_format": "bmp"}, "WEBP": {"lossless": True, "exact": True},
    "JPEG2000": {"irreversible": False},
}  # fmt: skip


def test_any_lossless_encoding_gives_the_same_logits(rgb_model_path: Path) -> None:
    """To the bit: the network sees the same pixels, cut and resized in the same way."""
    image = Image.fromarray(pixels(48, 48))
    files = [encoded(image, kind, **options) for kind, options in LOSSLESS.items()]
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"):
        files.append(encoded(image, "TIFF", compression=compression))
    files.append(encoded(image, "PNG", compress_level=0))
    files.append(encoded(image.convert("RGBA")))
    turned = Image.Exif()
    turned[0x0112] = 3
    files.append(encoded(image.rotate(180), "PNG", exif=turned))
    artifact = open_artifact(rgb_model_path, "cpu")
    cut = [decode(raw, 3, tuple(artifact.metadata.image_size)) for raw in files]
    logits = [artifact.run(image_HWC[np.newaxis])[0] for image_HWC in cut]
    for each in logits:
        np.testing.assert_array_equal(each, logits[0])


def test_any_lossless_encoding_of_grey_gives_the_same_logits(model_path: Path) -> None:
    grey = Image.fromarray(pixels(48, 48, channels=1)[..., 0])
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files = [encoded(grey, kind) for kind in ("PNG", "GIF", "BMP", "PPM", "TIFF", "TGA")]
    files += [encoded(grey.convert("RGB")), encoded(deep), encoded(deep, "TIFF"), encoded(grey.convert("LA"))]
    artifact = open_artifact(model_path, "cpu")
    cut = [decode(raw, 1, tuple(artifact.metadata.image_size)) for raw in files]
    logits = [artifact.run(image_HWC[np.newaxis])[0] for image_HWC in cut]
    for each in logits:
        np.testing.assert_array_equal(each, logits[0])


def test_exif_data_that_are_none_are_passed_over() -> None:
    """Viewers show such a picture as it is, and Pillow passes them over in a JPEG; in others it raised."""
    array = pixels(6, 9)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        for exif in (b"no data of the kind", b"Exif\0\0" + bytes(20), b"II*\0"):
            raw = encoded(Image.fromarray(array), kind, exif=exif, **options)
            np.testing.assert_array_equal(decode(raw, 3, None), array)


def test_every_exif_orientation_is_applied() -> None:
    """As the EXIF standard defines them, 1 to 8, with numpy as the oracle."""
    array = pixels(4, 6)
    upright = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1],
        5: array.swapaxes(0, 1), 6: np.rot90(array, -1), 7: array[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(array),
    }  # fmt: skip
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("PNG", "TIFF"):
            found = decode(encoded(Image.fromarray(array), kind, exif=exif), 3, None)
            np.testing.assert_array_equal(found, expected)


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures are converted in strips of rows; the pixels are those of the whole."""
    rng = np.random.default_rng(0)
    deep = encoded(Image.fromarray(rng.integers(0, 65536, (50, 7), dtype=np.uint16)))
    clear = encoded(Image.fromarray(rng.integers(0, 256, (50, 7, 4), dtype=np.uint8)))
    whole = [decode(deep, 1, None), decode(clear, 3, None), decode(clear, 1, None)]
    monkeypatch.setattr(image_module, "_STRIP_PIXELS", 20)  # two rows
    for first, second in zip(
        whole, [decode(deep, 1, None), decode(clear, 3, None), decode(clear, 1, None)], strict=True
    ):
        np.testing.assert_array_equal(first, second)


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

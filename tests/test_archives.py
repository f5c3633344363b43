"""Archives from outside: a damaged one is never unpacked as if it were whole, whatever it is packed with."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sdpipe.data.archives import unpack
from sdpipe.errors import DataError


def _contents(generator: np.random.Generator) -> dict[str, bytes]:
    return {f"bee/{number}é.png": generator.bytes(2_000) for number in range(3)}


def _tar(contents: dict[str, bytes], mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _zip(contents: dict[str, bytes], compression: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as zip_file:
        for name, content in contents.items():
            zip_file.writestr(name, content)
    return stream.getvalue()


def _packed(kind: str, contents: dict[str, bytes]) -> bytes:
    zips = {
        "zip": zipfile.ZIP_DEFLATED,
        "zip of bzip2": zipfile.ZIP_BZIP2,
        "zip of lzma": zipfile.ZIP_LZMA,
    }
    return _zip(contents, zips[kind]) if kind in zips else _tar(contents, f"w:{kind}")


def _unpacked(archive: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    unpack(archive, folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "zip of bzip2", "zip of lzma"])
def test_a_damaged_byte_is_found_wherever_it_is(tmp_path: Path, kind: str) -> None:
    """Of 60 archives with a damaged byte each is refused, or gives what was packed.

    A zip's directory has no checksum: damage there can change a name, or hide a member.
    """
    generator = np.random.default_rng(0)
    contents = _contents(generator)
    whole = _packed(kind, contents)
    archive = tmp_path / "pictures"
    archive.write_bytes(whole)
    assert _unpacked(archive, tmp_path / "whole") == contents
    refused = 0
    for number, at in enumerate(generator.integers(len(whole), size=60)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.integers(8)
        archive.write_bytes(damaged)
        try:
            files = _unpacked(archive, tmp_path / str(number))
        except DataError:
            refused += 1
        else:
            assert set(files.values()) <= set(contents.values())
            assert kind.startswith("zip") or files == contents
    assert refused > 45


@pytest.mark.parametrize("size", [4_000, 3_584, 5_000, 1_000])
def test_a_tar_without_compression_that_breaks_off_is_refused(tmp_path: Path, size: int) -> None:
    """In a member's header, between two members, in a member, in the first header."""
    archive = tmp_path / "pictures.tar"
    archive.write_bytes(_tar(_contents(np.random.default_rng(0)), "w:")[:size])
    with pytest.raises(DataError, match=r"pictures\.tar: damaged"):
        _unpacked(archive, tmp_path / "out")


def test_a_damaged_header_does_not_end_a_tar(tmp_path: Path) -> None:
    """tarfile passes over all members from there on."""
    whole = bytearray(_tar(_contents(np.random.default_rng(0)), "w:"))
    whole[3_584 + 100] ^= 1
    archive = tmp_path / "pictures.tar"
    archive.write_bytes(whole)
    with pytest.raises(DataError, match=r"pictures\.tar: damaged.* no member and no end at byte 3,584"):
        _unpacked(archive, tmp_path / "out")


def _pax(**headers: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("bee/0.png")
        member.size, member.pax_headers = (
            4,
            {name.replace("_", "."): value for name, value in headers.items()},
        )
        tar.addfile(member, io.BytesIO(b"abcd"))
    return stream.getvalue()


def _renamed(name: bytes) -> bytes:
    """A zip with one member of that name, which `zipfile` itself would not write."""
    stand_in = "x" * len(name)
    return _zip({f"{stand_in}": b"abcd"}, zipfile.ZIP_STORED).replace(stand_in.encode(), name)


@pytest.mark.parametrize(
    "content",
    [
        _pax(mtime="nan"),
        _pax(mtime="1e300"),
        _pax(path="bee/a\0b.png"),
        _pax(size=str(2**63)),
        _pax(GNU_sparse_map="a,b"),
        _renamed(b"\0abc"),
        _zip({"é" * 10: b"abcd"}, zipfile.ZIP_STORED).replace("é".encode(), b"\xc3\xc3"),
        _zip({"a/" + "x" * 300: b"abcd"}, zipfile.ZIP_STORED),
        _zip({"a": b"abcd", "a/b": b"abcd"}, zipfile.ZIP_STORED),
        _zip({"a": b"abcd" * 100}, zipfile.ZIP_STORED)[100:],
        _zip({"t/": b"", "t\\bee\\0.png": b"abcd", "readme.txt": b"abcd"}, zipfile.ZIP_STORED),
        _zip({"t/bee/0.png": b"abcd", "t/cow\\0.png": b"abcd"}, zipfile.ZIP_STORED),
        _tar({"bee/0.png": b"abcd"}, "w:") + _tar({"cow/0.png": b"abcd"}, "w:"),
    ],
    ids=[
        "no date", "a late date", "NUL in a name", "a large size", "no sparse map", "an empty name",
        "a name that is no UTF-8", "a long name", "a file and a folder of one name", "no beginning",
        "backslashes", "backslashes beside slashes", "two archives in one",
    ],
)  # fmt: skip
def test_odd_archives_are_named(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "pictures"
    archive.write_bytes(content)
    with pytest.raises(DataError, match=f"^{archive}: "):
        _unpacked(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "contents"),
    [
        # POSIX leaves undefined what fills the last record.
        (_tar({"bee/0.png": b"abcd"}, "w:") + b"\n" + bytes(range(256)) * 8, {"bee/0.png": b"abcd"}),
        (bytes(512) + _zip({"bee/0.png": b"abcd"}, zipfile.ZIP_STORED), {"bee/0.png": b"abcd"}),
    ],
    ids=["padding", "a zip behind zeros"],
)  # fmt: skip
def test_odd_archives_that_are_right(tmp_path: Path, content: bytes, contents: dict[str, bytes]) -> None:
    archive = tmp_path / "pictures"
    archive.write_bytes(content)
    assert _unpacked(archive, tmp_path / "out") == contents


def test_names_that_are_not_marked_as_utf_8_are_read_as_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Info-ZIP and macOS mark none. Others have code page 437, which is right for some, and is said."""
    for encoding in ("utf-8", "cp437"):
        archive = tmp_path / f"{encoding}.zip"
        archive.write_bytes(_renamed("Größe.png".encode(encoding)))
        assert _unpacked(archive, tmp_path / encoding) == {"Größe.png": b"abcd"}
        told = capsys.readouterr().err
        assert ("read as code page 437, such as Größe.png" in told) == (encoding == "cp437")


def test_the_note_shows_a_name_that_may_be_wrong_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one that is marked as UTF-8; nor does a name bring a line or a colour of its own."""
    archive = tmp_path / "pictures.zip"
    unmarked = "x" * 12  # the same length in both of its places
    packed = _zip({"Größe.png": b"ef", unmarked: b"abcd"}, zipfile.ZIP_STORED)
    archive.write_bytes(packed.replace(unmarked.encode(), b"\x1b[31m\n\xfcx.png"))
    assert sorted(_unpacked(archive, tmp_path / "out").values()) == [b"abcd", b"ef"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"such as \x1b[31m\nⁿx.png")


def test_a_letter_of_two_bytes_is_no_backslash(tmp_path: Path) -> None:
    """The second byte of the Japanese letter for `table` is a backslash's, in Shift-JIS."""
    archive = tmp_path / "pictures.zip"
    archive.write_bytes(_renamed("表/0.png".encode("shift-jis")))
    assert list(_unpacked(archive, tmp_path / "out").values()) == [b"abcd"]


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    contents = {"bee/0.png": b"abcd", "z.zip": _zip({"left/0.png": b"x"}, zipfile.ZIP_STORED)}
    archive = tmp_path / "pictures.tar"
    archive.write_bytes(_tar(contents, "w:"))
    assert _unpacked(archive, tmp_path / "out") == contents


@pytest.mark.parametrize("content", [b"7z\xbc\xaf\x27\x1c" * 100, b"Rar!\x1a\x07\x01\x00" * 100])
def test_other_archives_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pictures").write_bytes(content)
    with pytest.raises(DataError, match="no archive of the kinds tar and zip: [a-z ]*$"):
        unpack(tmp_path / "pictures", tmp_path / "out")

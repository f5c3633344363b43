"""Unpacking tar, zip and gzip files that come from outside."""

import errno
import gzip
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath

from sdpipe.errors import DataError, on_one_line, tell

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_MARKED_UTF_8 = 1 << 11  # of a zip member's flags
# What the standard library raises on damaged archives: names that are no text, numbers that are none or too
# large for the system, encryption.
_DAMAGED = (
    EOFError,
    IndexError,
    OverflowError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
# Of the errors that the system reports, those that come from an archive's names and offsets.
_OF_THE_ARCHIVE = (
    None,
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar (plain, gz, bz2, xz) or zip archive into the empty folder `folder`.

    Only plain files and folders with relative paths are accepted, no link of any kind: by chains of links an
    archive gets past the checks of single members. Every member is judged before the first is written.
    Raises DataError naming the archive, and the member where it is one.
    """
    try:
        if zipfile.is_zipfile(archive) and not _is_tar(archive):  # whose last member may be a zip
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive}: refused, its member {error.tarinfo.name!r} is unsafe: {error}"
        ) from error
    except _DAMAGED as error:
        raise _damaged(archive, error) from error
    except OSError as error:
        if error.errno not in _OF_THE_ARCHIVE:  # the disk's fault
            raise
        raise _damaged(archive, error.strerror or error) from error


def _damaged(path: Path, error: Exception | str) -> DataError:
    reason = str(error).partition(":\n")[0]  # without tarfile's list of what it tried
    return DataError(f"{path}: damaged, truncated or no archive of the kinds tar and zip: {reason}")


def _check_member(archive: Path, name: str, *, plain: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if not plain or path.is_absolute() or ".." in path.parts:
        reason = "it would leave the folder" if plain else "it is no plain file or folder"
        raise DataError(f"{archive}: refused, its member {name!r} is unsafe: {reason}")


def _is_tar(path: Path) -> bool:
    """Whether it begins with a member of one."""
    with suppress(tarfile.TarError), tarfile.open(path) as tar:
        return tar.next() is not None
    return False


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            _check_member(archive, member.name, plain=member.isreg() or member.isdir())
        _check_end(tar)
        tar.extractall(folder, filter="data")


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless the walk through the members stopped at a block of zeros, the mark of the end.

    A walk stops as silently where the file breaks off and at a damaged header. Then all is read that follows:
    it may be anything but further members, and gzip, bzip2 and xz compare their checksums, which stand there.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no member and no end at byte {tar.offset:,}")
    while rest := tar.fileobj.read(_CHUNK_BYTES):
        for at in range(0, len(rest), tarfile.BLOCKSIZE):
            with suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(rest[at : at + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
                raise tarfile.ReadError(f"members stand behind its end at byte {tar.offset:,}")


def _unpack_zip(archive: Path, folder: Path) -> None:
    zip_file, is_utf_8 = _open_zip(archive)
    with zip_file:
        for info in zip_file.infolist():
            # Within a letter of another code page the same byte is no backslash.
            if "\\" in info.filename and (is_utf_8 or info.filename.isascii()):
                raise DataError(
                    f"{archive}: refused, its member {info.filename!r} has \\ in place of /; pack it again"
                )
            kind = stat.S_IFMT(info.external_attr >> 16)
            _check_member(archive, info.filename, plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
        zip_file.extractall(folder)


def _open_zip(archive: Path) -> tuple[zipfile.ZipFile, bool]:
    """Names that are not marked as UTF-8 mostly are all the same (Info-ZIP's, macOS's), else code page 437.

    That is the format's own; what it makes of names in another code page, people see. Returns whether all are
    UTF-8, too.
    """
    try:
        return zipfile.ZipFile(archive, metadata_encoding="utf-8"), True
    except UnicodeDecodeError:
        zip_file = zipfile.ZipFile(archive)
        names = (info.filename for info in zip_file.infolist() if not info.flag_bits & _MARKED_UTF_8)
        odd = on_one_line(next(name for name in names if not name.isascii()))
        tell(f"note: {archive}: names in it are not UTF-8, and are read as code page 437, such as {odd}")
        return zip_file, False


def read_gzip(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file, unpacked if it is in gzip's format, whatever its name.

    Raises DataError if it is damaged or truncated, or has more bytes.
    """
    try:
        with path.open("rb") as packed:
            is_packed = packed.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        with gzip.open(path) if is_packed else path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise DataError(f"{path}: unpacked it has over {max_bytes:,} bytes")
        return raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, error) from error

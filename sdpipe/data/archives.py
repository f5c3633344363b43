"""Unpacking tar, zip and gzip files that come from outside."""

import gzip
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from sdpipe.errors import DataError

_DAMAGED = (
    EOFError,
    OSError,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    RuntimeError,
    NotImplementedError,
)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar (plain, gz, bz2, xz) or zip archive into `folder`.

    Only plain files and folders that stay inside `folder` are written; a member that would leave it, a
    device or a link out of it is refused. Raises DataError naming the archive, and the member where it is
    one.
    """
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            _unpack_tar(archive, folder)
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive}: refused, its member {error.tarinfo.name!r} is unsafe: {error}"
        ) from error
    except _DAMAGED as error:
        raise DataError(f"{archive}: damaged, truncated or no archive: {error}") from error


def _unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        # Every member is judged before the first one is written.
        for member in tar:
            if PurePosixPath(member.name).is_absolute():  # the filter would strip the slash instead
                raise DataError(f"{archive}: refused, its member {member.name!r} has an absolute path")
            tarfile.data_filter(member, str(folder))
        tar.extractall(folder, filter="data")


def _unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as zip_file:
        for info in zip_file.infolist():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            kind = stat.S_IFMT(info.external_attr >> 16)
            if path.is_absolute() or ".." in path.parts or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{archive}: refused, its member {info.filename!r} is unsafe")
        zip_file.extractall(folder)


def read_gzip(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz.

    Raises DataError if it is damaged or truncated.
    """
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            return stream.read()
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: damaged or truncated: {error}") from error

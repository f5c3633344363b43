"""Writing files so that a reader never sees a half of one, and their digests."""

import csv
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from sdpipe.errors import DataError


def project_root() -> Path:
    """The repository that DVC runs in, also when `dvc exp` runs a stage in a temporary copy of it.

    Unfinished work and the MLflow store belong there.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).resolve()


def local_path(source: str) -> Path:
    """A source on disk; a relative path starts at the project's root, wherever DVC runs the stage."""
    return project_root() / Path(source).expanduser()


def work_folder() -> Path:
    """`.sdpipe/` in the project's root: what is unfinished (downloads, checkpoints, locks)."""
    folder = project_root() / ".sdpipe"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; when the block succeeds, sync it and rename it over `path`.

    When the block fails, the new file is removed and the old one stays as it was.
    """
    if not _BESIDE.fullmatch(path.parent.name):  # replacing_folder made it; if it is gone, what it held is
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; when the block succeeds, it takes the place of `path`.

    Processes that may write the same folder must take turns. Raises DataError if `path` is a link, which
    cannot be replaced without a guess at what is meant.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise DataError(f"{path}: is a link; expected a folder, or nothing")
    beside = _beside(path)
    beside.mkdir(mode=0o700)
    try:
        yield beside
        beside.chmod(0o755)
        sync_folder(beside)
        if path.exists():
            shutil.rmtree(path)
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        _name(error, path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


_BESIDE = re.compile(r"\..+\.[0-9]+\.tmp", re.DOTALL)


def _beside(path: Path) -> Path:
    """A hidden name for what this process writes: that of `path` with the process's id.

    What a process that was killed left under such a name is removed; what a living one writes stays.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            with suppress(FileNotFoundError):  # another process removes it, too
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _name(error: OSError, path: Path) -> None:
    """A write to a full disk does not say by itself which file it was; NumPy's does not even say why."""
    if error.errno is None:
        raise DataError(f"{path}: {error}") from error
    if error.filename is None:
        error.filename = str(path)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON with keys in the given order; NaN and infinities are refused."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with its header; None is an empty cell."""
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_records(path: Path, row_type: type, rows: Iterable[Any]) -> None:
    """Write instances of a dataclass as a table with a column for each field."""
    names = [column.name for column in fields(row_type)]
    write_csv(path, names, ([getattr(row, name) for name in names] for row in rows))


def read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object from a file. Raises DataError if it is missing or damaged, or lacks one of the keys."""
    try:
        value = json.loads(path.read_text())
    except (OSError, RecursionError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    if missing := [key for key in keys if key not in value]:
        raise DataError(f"{path}: expected an entry {missing[0]}; an older sdpipe wrote it, or it is damaged")
    return value

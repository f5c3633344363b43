"""What folders of pictures hold, for training, evaluation and prediction; only the last follows no links."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sdpipe.errors import DataError

OF_ARCHIVERS = "__MACOSX"
"""A folder that macOS puts beside what was packed, which is no class."""


def composed(name: str) -> str:
    """File systems keep an accent as a letter of its own or not: the same name in either case."""
    return unicodedata.normalize("NFC", name)


def files_of_class(folder: Path, unlisted: Callable[[OSError], object]) -> Iterator[Path]:
    """The files below a class folder, to any depth, hidden ones left out; links to folders are followed.

    unlisted: as of `walk`. Raises DataError at a link to a folder that it lies in.
    """
    for parent, names in walk(str(folder), unlisted, through_links=True):
        here = Path(parent)
        if here.is_symlink() and here.resolve() in [each.resolve() for each in _above(here)]:
            raise DataError(f"{here}: a link to a folder that it lies in")
        yield from (here / name for name in names)


def _above(path: Path) -> Iterable[Path]:
    """The folders that it lies in; of a path with `..`, not those that it leads out of."""
    return Path(os.path.abspath(path)).parents  # noqa: PTH100  Path.absolute leaves `..`


def walk(
    top: str, unlisted: Callable[[OSError], object], *, through_links: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, each with the names of its files, sorted; hidden ones are left out.

    unlisted: called with what the system says of a folder that cannot be listed. through_links: whether
    links to folders are followed.
    """
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder or ".") as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            unlisted(error)
            continue
        below, files = [], []
        for entry in sorted(visible, key=lambda entry: entry.name):
            path = os.path.join(folder, entry.name)  # noqa: PTH118
            if not (entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and is_folder(path))):
                files.append(entry.name)
            elif through_links or not entry.is_symlink():
                below.append(path)
        yield folder, files
        waiting += reversed(below)


def is_folder(name: str) -> bool:
    """Whether a folder, or a link to one, has this name."""
    return os.path.isdir(name)  # noqa: PTH112  Path.is_dir raises for a link that may not or cannot be followed

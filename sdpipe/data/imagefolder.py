"""A user's own pictures in class folders, as training and test arrays.

Accepted: `<split>/<class>/**/*` with the splits train, test and validation (or val, valid), where test and
validation may be missing; or `<class>/**/*`. What has no test part is split, stratified, with a seed.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from sdpipe.data.split import split_stratified
from sdpipe.data.store import ArrayWriter
from sdpipe.errors import DataError, ImageError
from sdpipe.runtime.cores import num_cores
from sdpipe.runtime.folders import OF_ARCHIVERS, composed, files_of_class
from sdpipe.runtime.image import decode, image_suffixes

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_CHUNK = 256  # pictures decoded at a time
_MAX_NAMED = 5  # damaged pictures, and endings, named in one error


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The pictures of a tree: for each split, paths and class numbers."""

    class_names: list[str]
    splits: dict[str, list[tuple[Path, int]]]
    num_ignored: int  # files without a picture's ending, or in no class folder


def list_pictures(root: Path) -> Listing:
    """Find the class folders and their pictures, sorted by name.

    Raises DataError naming the folder: no classes, a class without a picture, a class that one split has
    and another has not.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    around, root = _descend(root)
    folders = _subfolders(root)
    by_split = _find_splits(root, folders)
    class_names = sorted(_class_folders(by_split["train"]))
    if len(class_names) < 2:
        raise DataError(
            f"{by_split['train']}: expected a folder for each of at least 2 classes, found {class_names}"
        )
    for name in class_names:
        if not name.isprintable():
            raise DataError(f"{by_split['train']}: the class folder {name!r} has no printable name")
    num_ignored = sum(map(_num_files, {*around, root} - set(by_split.values())))
    splits = {}
    for split, folder in by_split.items():
        splits[split], ignored = _list_split(folder, class_names)
        num_ignored += ignored
    return Listing(class_names=class_names, splits=splits, num_ignored=num_ignored)


def _find_splits(root: Path, folders: list[Path]) -> dict[str, Path]:
    """Split name -> folder; where no folder is named like a split, the root is one tree of classes."""
    named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    if not named:
        return {"train": root}
    by_split: dict[str, Path] = {}
    for folder in named:
        split = SPLIT_NAMES[folder.name.lower()]
        if split in by_split:
            raise DataError(f"{folder}: the {split} part is {by_split[split]} already")
        by_split[split] = folder
    if "train" not in by_split:
        raise DataError(f"{root / 'train'}: no such folder, beside {named[0].name}")
    if len(named) < len(folders):
        extra = next(folder for folder in folders if folder not in named)
        raise DataError(f"{extra}: beside a train folder, expected only {', '.join(SPLIT_NAMES)}")
    return by_split


def _descend(root: Path) -> tuple[list[Path], Path]:
    """Archives often hold everything in one folder; go into it. The folders around it, and that one."""
    around: list[Path] = []
    while True:
        inside = _subfolders(root)
        if len(inside) != 1 or inside[0].name.lower() in SPLIT_NAMES or not _subfolders(inside[0]):
            return around, root
        around.append(root)
        (root,) = inside


def _class_folders(folder: Path) -> dict[str, Path]:
    """The folders by class name."""
    by_name: dict[str, Path] = {}
    for path in _subfolders(folder):
        name = composed(path.name)
        if name in by_name:
            raise DataError(f"{path}: a second folder of the class {name}, of the same letters")
        by_name[name] = path
    return by_name


def _num_files(folder: Path) -> int:
    return sum(not path.is_dir() for path in _visible(folder))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir() and path.name != OF_ARCHIVERS]


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, hidden entries left out.

    Raises DataError if it cannot be listed, or at a link to nowhere, which may have led to a class.
    """
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        _refuse_unlisted(error)
    _check_links(found)
    return found


def _files_of(folder: Path) -> list[Path]:
    """The files of a class, sorted. Raises DataError as `_visible`."""
    files = sorted(files_of_class(folder, _refuse_unlisted))
    _check_links(files)
    return files


def _refuse_unlisted(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from error


def _check_links(found: list[Path]) -> None:
    for path in found:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path}: a link to nowhere; expected a file or a folder behind it")


def _list_split(folder: Path, class_names: list[str]) -> tuple[list[tuple[Path, int]], int]:
    found = _class_folders(folder)
    if missing := sorted(set(class_names) - set(found)):
        raise DataError(f"{folder / missing[0]}: class folder missing, the training part has it")
    if unknown := sorted(set(found) - set(class_names)):
        raise DataError(f"{folder / unknown[0]}: a class that the training part does not have")
    endings = image_suffixes()
    pictures: list[tuple[Path, int]] = []
    num_ignored = _num_files(folder)
    for k, name in enumerate(class_names):
        files = _files_of(found[name])
        chosen = [path for path in files if path.suffix.lower() in endings]
        if not chosen:
            raise DataError(f"{found[name]}: class folder without a picture; {_what_is_there(files)}")
        pictures += [(path, k) for path in chosen]
        num_ignored += len(files) - len(chosen)
    return pictures, num_ignored


def _what_is_there(files: list[Path]) -> str:
    """Of files that are no pictures, since none of their endings is one's."""
    if not files:
        return "it is empty"
    endings = Counter(path.suffix or "without ending" for path in files).most_common(_MAX_NAMED)
    return f"its files are {', '.join(f'{count:,} {ending}' for ending, count in endings)}"


def hold_out_test(
    pictures: list[tuple[Path, int]], fraction: float, seed: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Split into training and test part, stratified by class, each in the given order."""
    labels = [label for _, label in pictures]
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise DataError(
            f"{pictures[labels.index(int(counts.argmin()))][0].parent}: 1 picture, a split needs 2"
        )
    train, test = split_stratified(labels, fraction, seed, "fetch.imagefolder")
    return [pictures[at] for at in train], [pictures[at] for at in test]


def write_pictures(
    folder: Path,
    part: str,
    pictures: list[tuple[Path, int]],
    size_HW: tuple[int, int],
    channels: int,
    crop_fraction: float = 1.0,
) -> list[str]:
    """Decode pictures into `<part>_images.npy` and `<part>_labels.npy`.

    Returns a sentence on each unreadable one; the files are of no use where there is any.
    """
    writer = ArrayWriter(folder, part, len(pictures), (*size_HW, channels))
    unreadable: list[str] = []

    def read(picture: tuple[Path, int]) -> np.ndarray | str:
        try:
            return decode(picture[0], channels, size_HW, crop_fraction)
        except ImageError as error:
            return f"{picture[0]}: {error}"

    with (
        ThreadPoolExecutor(num_cores()) as pool,
        tqdm(total=len(pictures), desc=part, disable=None) as bar,
    ):
        for chunk in _chunks(pictures):
            results = list(pool.map(read, chunk))
            unreadable += [result for result in results if isinstance(result, str)]
            if not unreadable:
                images = [result for result in results if not isinstance(result, str)]
                writer.append(np.stack(images), np.array([label for _, label in chunk]))
            bar.update(len(chunk))
    if not unreadable:
        writer.close()
    return unreadable


def refuse_unreadable(unreadable: list[str]) -> None:
    """Raise DataError, naming the first of them, if there are any: all parts are looked through before."""
    if unreadable:
        more = f" (and {len(unreadable) - _MAX_NAMED} more)" if len(unreadable) > _MAX_NAMED else ""
        raise DataError("; ".join(unreadable[:_MAX_NAMED]) + more)


def _chunks(pictures: list[tuple[Path, int]]) -> Iterable[list[tuple[Path, int]]]:
    return (pictures[start : start + _CHUNK] for start in range(0, len(pictures), _CHUNK))

"""Training pictures that stay in their files: a table of them, and reading one.

H, W: height and width; C: channels.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sdpipe.errors import DataError, ImageError
from sdpipe.runtime.image import Box, centre_box, cut, open_picture

ChooseBox = Callable[[tuple[int, int]], Box]
"""The box that is cut out of a picture, given its height and width in pixels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureFiles:
    """Pictures by number, decoded each time they are asked for.

    table: structured (N,), `path` relative to the root, `size` in bytes; best memory-mapped, since processes
    then share it.
    """

    root: Path
    table: np.ndarray
    size_HW: tuple[int, int]
    channels: int
    crop_fraction: float

    def __len__(self) -> int:
        return len(self.table)

    def path(self, number: int) -> Path:
        """Of one picture."""
        return self.root / os.fsdecode(bytes(self.table[number]["path"]))

    def read(self, number: int, choose_box: ChooseBox | None = None) -> np.ndarray:
        """One picture, uint8 (H, W, C); without a choice the centred box that evaluation cuts out.

        Raises DataError naming the file if it cannot be read, or is not what was listed.
        """
        path, listed = self.path(number), int(self.table[number]["size"])
        try:
            found = path.stat().st_size
            if found != listed:
                raise DataError(
                    f"{path}: {found} bytes, and {listed} when it was listed; run `dvc repro -f` on its fetch"
                )
            image = open_picture(path, self.channels)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error
        size_HW = (image.height, image.width)
        if choose_box is None:
            return cut(image, centre_box(size_HW, self.size_HW, self.crop_fraction), self.size_HW)
        return cut(image, choose_box(size_HW), self.size_HW)


def make_table(paths: list[Path], root: Path) -> np.ndarray:
    """The table of pictures below `root`. Raises DataError naming a file that is empty or not there."""
    names = [os.fsencode(path.relative_to(root)) for path in paths]
    kind = np.dtype([("path", f"S{max(map(len, names))}"), ("size", "<i8")])
    listed = tqdm(zip(names, paths, strict=True), desc="train", total=len(paths), disable=None)
    return np.array([(name, _size(path)) for name, path in listed], dtype=kind)


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not size:
        raise DataError(f"{path}: the file is empty")
    return size

"""The channel by which decoded pictures come to a training, and what stands in its way."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from picture_files import make_pictures, open_images

from sdpipe.data.store import DataSet
from sdpipe.errors import LoadingError
from sdpipe.training.decoding import FileImages


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is no longer than it must be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def open_soon(dataset: DataSet, workers: int = 1) -> FileImages:
    """What is waited for in vain ends after 20 s."""
    images = open_images(dataset, workers)
    images._loader.timeout = 20
    return images


@pytest.mark.parametrize("length", [75, 76])
def test_temporary_files_may_have_any_folder_or_one_line_says_why_not(
    pictures: DataSet, monkeypatch: pytest.MonkeyPatch, short: Path, length: int
) -> None:
    """unix(7) lets a socket's path have 107 bytes; the training waited for ever."""
    folder = short / ("x" * (length - len(f"{short}/")))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    batches = open_soon(pictures).batches([np.arange(4)])
    if length == 75:
        next(batches)
        return
    told = f"^no picture can be sent to the training: TMPDIR, {folder}, is of 76 bytes, .* let it have 75$"
    with pytest.raises(LoadingError, match=told):
        next(batches)


def test_a_folder_for_temporary_files_that_is_gone_is_one_line(
    pictures: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a scheduler has cleaned up; a process that has too many files open says it in the same way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(LoadingError, match=r"^no picture can be sent to the training: .*No such file.*/gone"):
        next(open_soon(pictures).batches([np.arange(4)]))

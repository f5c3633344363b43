"""data/<dataset>/, which a fetch replaces: what must not be lost by it, and what is damaged in it."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from filelock import FileLock
from test_imagefolder import folder_config, make_tree

from pipeline import train as stage
from sdpipe.config import read_params
from sdpipe.data.config import DigitsConfig
from sdpipe.data.fetch import fetch
from sdpipe.data.store import check_arrays, open_dataset
from sdpipe.errors import ConfigError, DataError


def test_no_fetch_deletes_its_own_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = make_tree(tmp_path / "data" / "imagefolder")
    for source in (tree, "data/imagefolder", "data"):
        with pytest.raises(ConfigError, match=r"fetch\.imagefolder\.source: .*data/imagefolder"):
            fetch("imagefolder", folder_config(source), Path("data/imagefolder"), tmp_path / "dl")
    assert len(list(tree.rglob("*.png"))) == 24


def test_an_output_that_is_a_link_is_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"/out: is a link; expected a folder, or nothing"):
        fetch("imagefolder", folder_config(tree), tmp_path / "out", tmp_path / "dl")


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a list": ("meta.json", lambda _raw: b"[]"),
    "brackets": ("meta.json", lambda _raw: b"[" * 100_000),
    "another type": ("meta.json", lambda raw: raw.replace(b'"train_parts": [', b'"train_parts": 5, "x": [')),
    "a zip": ("train_images.npy", lambda _raw: b"PK\x03\x04" + bytes(100)),
    "half an array": ("train_images.npy", lambda raw: raw[: len(raw) // 2]),
    "a header without an end": ("test_labels.npy", lambda raw: raw.replace(b"}", b"(")),
    "other labels": ("train_labels.npy", lambda _raw: _npy(np.zeros(5))),
    "fewer images": ("test_images.npy", lambda _raw: _npy(np.zeros((1, 8, 8, 3), np.uint8))),
}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_a_data_set_that_cannot_be_read_is_not_to_be_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It may be whole, and a fetch would meet the same; one that is not there is fetched."""

    def refused(_path: Path) -> str:
        raise OSError(number, os.strerror(number), "meta.json")

    with pytest.raises(DataError, match="/out: no whole data set: .*; run `dvc repro fetch@out`"):
        open_dataset(tmp_path / "out")
    monkeypatch.setattr(Path, "read_text", refused)
    says = rf"/out: the data set cannot be read: \[Errno {number}\] {os.strerror(number)}: 'meta.json'$"
    with pytest.raises(DataError, match=says):
        open_dataset(tmp_path / "out")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NumPy leaves a file open
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_set_is_one_error(tmp_path: Path, damage: str) -> None:
    fetch("imagefolder", folder_config(make_tree(tmp_path / "mine")), tmp_path / "out", tmp_path / "dl")
    name, spoil = DAMAGES[damage]
    (tmp_path / "out" / name).write_bytes(spoil((tmp_path / "out" / name).read_bytes()))
    with pytest.raises(DataError, match=r"/out: no whole data set: .*; run `dvc repro fetch@out`"):
        open_dataset(tmp_path / "out")


def test_no_training_on_arrays_that_were_changed_in_place(
    project: Path,
) -> None:
    """`dvc repro -s` does not fetch, and the digest is of what was fetched: one history would have both."""
    params = (ROOT / "params.yaml").read_text()
    (project / "params.yaml").write_text(params)
    (project / "dvc.yaml").write_text("stages: {train: {do: {deps: [data]}}}\n")
    folder = project / "data" / read_params(project / "params.yaml")["train"]["dataset"]
    fetch("digits", DigitsConfig(test_fraction=0.2, seed=0), folder, project)
    check_arrays(folder)
    images_NHWC = np.load(folder / "train_images.npy", mmap_mode="r+")
    images_NHWC[7] = 255 - images_NHWC[7]
    images_NHWC.flush()
    with pytest.raises(
        DataError, match="/train_images.npy: not what was fetched; run `dvc repro -f -s fetch@digits`"
    ):
        stage.main("constant")
    assert not (project / ".sdpipe").exists()


@pytest.mark.slow
def test_two_fetches_at_once_take_turns(tmp_path: Path) -> None:
    """The second would take the first one's unfinished folder for a dead process's."""
    tree = make_tree(tmp_path / "mine")
    params = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("source: images ", f"source: {tree} "))
    lock = FileLock(tmp_path / ".sdpipe" / "fetch-imagefolder.lock")
    Path(lock.lock_file).parent.mkdir()
    words = [sys.executable, "-m", "pipeline.fetch", "imagefolder"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_ROOT": str(tmp_path)}
    with lock:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment)
        while lock.lock_file not in _open_files(process.pid):
            assert process.poll() is None, "it must wait"
        assert not (tmp_path / "data").exists()
    assert process.wait(60) == 0
    assert (tmp_path / "data" / "imagefolder" / "meta.json").exists()


def _open_files(pid: int) -> set[str]:
    names = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            names.add(str(link.readlink()))
    return names


@pytest.mark.slow
def test_a_stage_that_is_called_wrong_says_so() -> None:
    words = [sys.executable, "-m", "pipeline.fetch"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: called with []: missing a required argument: 'dataset'\n"

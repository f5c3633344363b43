"""What goes wrong with a download, an archive or the disk."""

import gzip
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loopback import Files
from published_sets import (
    cifar10_archive,
    cifar10_config,
    cifar_records,
    fashion_config,
    fashion_files,
    idx,
    left_behind,
    sha256,
    svhn_files,
    tar_of,
)
from scipy.io import savemat

from sdpipe.data.config import ArchiveConfig, DigitsConfig
from sdpipe.data.fetch import fetch
from sdpipe.data.formats import read_idx, read_svhn
from sdpipe.data.store import open_dataset
from sdpipe.errors import DataError


def test_a_damaged_svhn_file_is_named(tmp_path: Path) -> None:
    made = svhn_files(0)
    for part, (raw, _, _) in made.items():
        (tmp_path / f"{part}_32x32.mat").write_bytes(raw[: len(raw) // 2] if part == "extra" else raw)
    digests = {f"{part}_32x32.mat": sha256((tmp_path / f"{part}_32x32.mat").read_bytes()) for part in made}
    with pytest.raises(DataError, match=r"extra_32x32\.mat"):
        fetch("svhn", ArchiveConfig(source=str(tmp_path), sha256=digests), tmp_path / "svhn", tmp_path / "dl")


@pytest.mark.parametrize("num_dims", [0, 70])
def test_an_idx_file_of_odd_dimensions_is_named(num_dims: int) -> None:
    """NumPy has 64 at most."""
    with pytest.raises(DataError, match=rf"x: expected 1 to 3 dimensions, found {num_dims}"):
        read_idx(bytes([0, 0, 8, num_dims]) + (1).to_bytes(4, "big") * num_dims + b"x", "x")


@pytest.mark.parametrize("label", [0, 11, -5, 1.5, float("nan")])
def test_a_label_that_svhn_has_not_is_refused(tmp_path: Path, label: float) -> None:
    """10 stands for 0, and a remainder would make a digit of any number."""
    savemat(tmp_path / "x.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[10.0], [label]])})
    with pytest.raises(DataError, match=r"x\.mat: y: expected labels from 1 to 10"):
        read_svhn(tmp_path / "x.mat")


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """A cell array, as MATLAB has it."""
    y = np.array([1, 1], dtype=object)
    savemat(tmp_path / "x.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": y})
    with pytest.raises(DataError, match=r"x\.mat: y: expected labels from 1 to 10"):
        read_svhn(tmp_path / "x.mat")


def test_a_wrong_digest_is_refused_and_nothing_is_left(tmp_path: Path, files: Files) -> None:
    """One error with the address, the digest expected and the one found."""
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive[:-1] + b"x"
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: SHA-256 expected \w{64}, found \w{64}"):
        fetch("cifar10", cifar10_config(files.url, archive), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert left_behind(tmp_path / "data") == []
    assert left_behind(tmp_path / "dl") == ["cifar-10-binary.tar.gz.lock"]


def test_a_wrong_digest_of_a_local_file_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="SHA-256 expected"):
        fetch(
            "cifar10", cifar10_config(str(tmp_path), b"other"), tmp_path / "data" / "cifar10", tmp_path / "dl"
        )
    assert path.read_bytes() == b"mine"
    assert left_behind(tmp_path / "data") == []


def test_a_wrong_fashion_digest_names_the_file(tmp_path: Path) -> None:
    for name, raw in fashion_files().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw + b"x" if "t10k-labels" in name else raw))
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.*SHA-256"):
        fetch("fashion-mnist", fashion_config(str(tmp_path)), tmp_path / "out", tmp_path / "dl")


def test_a_little_file_that_unpacks_to_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before all of it is in memory."""
    monkeypatch.setattr("sdpipe.data.fetch.MAX_IDX_BYTES", 10**6)
    for name, raw in fashion_files().items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw) + gzip.compress(bytes(10**6)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: unpacked it has over 1,000,000 bytes"):
        fetch("fashion-mnist", fashion_config(str(tmp_path)), tmp_path / "out", tmp_path / "dl")


def test_a_broken_connection_is_resumed(tmp_path: Path, files: Files) -> None:
    """The second request asks for the rest, and the file is right."""
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    files.cut_after, files.cuts_left = 40_000, 1
    fetch("cifar10", cifar10_config(files.url, archive), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert [wanted for _, wanted in files.requests] == [None, "bytes=40000-"]


def test_a_download_that_ended_early_is_continued_by_the_next_fetch(tmp_path: Path, files: Files) -> None:
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    files.cut_after, files.cuts_left = 20_000, 99
    config = cifar10_config(files.url, archive)
    with pytest.raises(DataError, match=r"cifar-10-binary.*run again to continue"):
        fetch("cifar10", config, tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert left_behind(tmp_path / "data") == []
    files.cuts_left = 0
    fetch("cifar10", config, tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert files.requests[-1][1] == "bytes=40000-"


def test_a_server_without_ranges_sends_everything_again(tmp_path: Path, files: Files) -> None:
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    files.cut_after, files.cuts_left, files.knows_ranges = 40_000, 1, False
    fetch("cifar10", cifar10_config(files.url, archive), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert len(open_dataset(tmp_path / "data" / "cifar10").train_labels_N) == 50


def test_a_missing_file_on_the_server_is_said_at_once(tmp_path: Path, files: Files) -> None:
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: the server answered 404"):
        fetch("cifar10", cifar10_config(files.url, b""), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert len(files.requests) == 1


def test_no_server_at_all(tmp_path: Path, files: Files) -> None:
    with pytest.raises(DataError, match="the server cannot be reached"):
        fetch("cifar10", cifar10_config("http://127.0.0.1:9/", b""), tmp_path / "cifar10", tmp_path / "dl")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "parent": lambda: tar_of({"../escaped.txt": b"x"}),
    "deep parent": lambda: tar_of({"a/../../escaped.txt": b"x"}),
    "absolute": lambda: tar_of({"/escaped.txt": b"x"}),
    "link out": lambda: tar_of({"a.txt": b"x"}, links={"link": "../../outside"}),
    "chain of links": lambda: tar_of(
        {"d/escaped": b"x"}, links={"d/a": ".", "d/b": "a/../..", "link": "d/b/x"}
    ),
    "hard link": lambda: tar_of(
        {"escaped.txt": b"x"}, links={"hardlink": "escaped.txt"}, kind=tarfile.LNKTYPE
    ),
    "device": lambda: tar_of({}, links={"link": ""}, kind=tarfile.CHRTYPE),
    "link absolute": lambda: tar_of({"a.txt": b"x"}, links={"link": "/etc/passwd"}),
}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_members_that_would_escape_are_refused(tmp_path: Path, files: Files, kind: str, dataset: str) -> None:
    """The error names archive and member; nothing is written outside, nothing is left inside."""
    archive = HOSTILE[kind]()
    name = f"cifar-{dataset.removeprefix('cifar')}-binary.tar.gz"
    files.content[f"/{name}"] = archive
    config = ArchiveConfig(source=files.url, sha256={name: sha256(archive)})
    with pytest.raises(DataError, match=rf"{name}: refused, its member '.*(escaped|link|d/a)"):
        fetch(dataset, config, tmp_path / "data" / dataset, tmp_path / "dl")
    assert left_behind(tmp_path) == ["data", "dl", f"dl/{name}", f"dl/{name}.lock"]


@pytest.mark.parametrize(
    "damage", ["truncated", "no archive", "no records", "half a record", "too few names"]
)
def test_damaged_archives_with_the_right_digest(tmp_path: Path, damage: str) -> None:
    archive = {
        "truncated": lambda: cifar10_archive()[:5_000],
        "no archive": lambda: b"<html>moved</html>" * 50,
        "no records": lambda: tar_of({"batches.meta.txt": b"a\nb"}),
        "half a record": lambda: tar_of({"data_batch_1.bin": b"x" * 5_000, "test_batch.bin": b""}),
        "too few names": lambda: tar_of(
            {
                "data_batch_1.bin": cifar_records(10, 1, 0)[0],
                "test_batch.bin": cifar_records(10, 1, 0)[0],
                "batches.meta.txt": b"a\nb",
            }
        ),
    }[damage]()
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    with pytest.raises(DataError, match="cifar-10-binary|data_batch_1|cifar10"):
        fetch(
            "cifar10", cifar10_config(str(tmp_path), archive), tmp_path / "data" / "cifar10", tmp_path / "dl"
        )
    assert left_behind(tmp_path / "data") == []


def test_a_failed_fetch_leaves_the_old_data_set(tmp_path: Path) -> None:
    archive = cifar10_archive()
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    config = cifar10_config(str(tmp_path), archive)
    fetch("cifar10", config, tmp_path / "data" / "cifar10", tmp_path / "dl")
    before = left_behind(tmp_path / "data")
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive[:100])
    with pytest.raises(DataError):
        fetch("cifar10", config, tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert left_behind(tmp_path / "data") == before


def test_parts_of_two_shapes_are_refused(tmp_path: Path) -> None:
    made = fashion_files()
    made["t10k-images-idx3-ubyte"] = idx(np.zeros((20, 14, 14), np.uint8))
    for name, raw in made.items():
        (tmp_path / name).write_bytes(raw)
    config = ArchiveConfig(source=str(tmp_path), sha256={name: sha256(raw) for name, raw in made.items()})
    with pytest.raises(DataError, match="all images must have one shape"):
        fetch("fashion-mnist", config, tmp_path / "data" / "fashion-mnist", tmp_path / "dl")
    assert left_behind(tmp_path / "data") == []


def test_class_names_that_are_no_text(tmp_path: Path) -> None:
    records = cifar_records(10, 1, 0)[0]
    members = {"data_batch_1.bin": records, "test_batch.bin": records, "batches.meta.txt": b"\xff\xfe"}
    archive = tar_of(members)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    with pytest.raises(DataError, match="batches.meta.txt: expected class names in UTF-8"):
        fetch("cifar10", cifar10_config(str(tmp_path), archive), tmp_path / "data" / "x", tmp_path / "dl")


@pytest.mark.parametrize("name", ["class 1", "class\x1b[2J"])
def test_class_names_that_people_cannot_tell_apart(tmp_path: Path, name: str) -> None:
    """As those of class folders."""
    records = cifar_records(10, 1, 0)[0]
    names = "\n".join([name, *(f"class {k}" for k in range(1, 10))]).encode()
    members = {"data_batch_1.bin": records, "test_batch.bin": records, "batches.meta.txt": names}
    archive = tar_of(members)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive)
    with pytest.raises(DataError, match=r"cifar10: class '.*': expected printable names, each once"):
        fetch("cifar10", cifar10_config(str(tmp_path), archive), tmp_path / "data" / "x", tmp_path / "dl")


def test_two_fetches_at_once_take_turns(tmp_path: Path, files: Files) -> None:
    """Both end well, and the file is downloaded once."""
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    config = cifar10_config(files.url, archive)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fetch, "cifar10", config, tmp_path / name, tmp_path / "dl") for name in "ab"]
        assert [job.result()["num_train"] for job in jobs] == [50, 50]
    assert len(files.requests) == 1


def test_leftovers_of_a_killed_fetch_are_cleared(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as killed:
        pass
    (tmp_path / f".digits.{killed.pid}.tmp").mkdir()
    fetch("digits", DigitsConfig(test_fraction=0.2, seed=0), tmp_path / "digits", tmp_path / "dl")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


FULL_DISK = """
mount -t tmpfs -o size=64k tmpfs small
{python} - <<'END'
from pathlib import Path
from sdpipe.data.config import DigitsConfig
from sdpipe.data.fetch import fetch
from sdpipe.errors import errors_on_one_line
with errors_on_one_line():
    fetch("digits", DigitsConfig(test_fraction=0.2, seed=0), Path("small/digits"), Path("dl"))
END
echo exit $?
ls -A small
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """On a real file system of 64 KiB: exit 1, no traceback, no SIGBUS, nothing half-written."""
    (tmp_path / "small").mkdir()
    script = FULL_DISK.format(python=sys.executable)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["exit 1"]
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr

"""Every data set from a loopback server or from disk, in the true formats; and what goes wrong."""

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loopback import Files, serve
from scipy.io import savemat
from sklearn.datasets import load_digits

from sdpipe.data import sources
from sdpipe.data.config import ArchiveConfig, DigitsConfig
from sdpipe.data.fetch import fetch
from sdpipe.data.store import open_dataset
from sdpipe.errors import DataError


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    monkeypatch.setattr(sources, "ATTEMPTS", 2)  # of 4, so that failures take a second
    with serve() as served:
        yield served


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def tar_of(
    members: dict[str, bytes], *, links: dict[str, str] | None = None, kind: bytes = tarfile.SYMTYPE
) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return stream.getvalue()


def cifar_records(num: int, num_label_bytes: int, seed: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Records as the format's page describes them: label bytes, then 1024 red, 1024 green, 1024 blue."""
    rng = np.random.default_rng(seed)
    images_NHWC = rng.integers(0, 256, size=(num, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(num, dtype=np.uint8) % 10
    raw = b""
    for image, label in zip(images_NHWC, labels, strict=True):
        raw += bytes([99] * (num_label_bytes - 1) + [label])
        raw += b"".join(image[:, :, channel].tobytes() for channel in range(3))
    return raw, images_NHWC, labels


NAMES = [f"class {k}" for k in range(10)]


def cifar10_archive() -> bytes:
    members = {f"cifar-10-batches-bin/data_batch_{at}.bin": cifar_records(10, 1, at)[0] for at in range(1, 6)}
    members["cifar-10-batches-bin/test_batch.bin"] = cifar_records(10, 1, 9)[0]
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*NAMES, "", ""]).encode()
    return tar_of(members)


def cifar10_config(source: str, archive: bytes) -> ArchiveConfig:
    return ArchiveConfig(source=source, sha256={"cifar-10-binary.tar.gz": sha256(archive)})


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_digits_are_scikit_learns_at_256_levels(tmp_path: Path) -> None:
    """1,797 digits, a fifth held out, stratified; level 16 becomes 255."""
    meta = fetch("digits", DigitsConfig(test_fraction=0.2, seed=0), tmp_path / "digits", tmp_path / "dl")
    dataset = open_dataset(tmp_path / "digits")
    assert (meta["num_train"], meta["num_test"]) == (1437, 360)
    assert max(meta["test_images_per_class"]) - min(meta["test_images_per_class"]) <= 2
    pixels = np.sort(load_digits().data.ravel())
    ours = np.sort(np.concatenate([dataset.train_images.ravel(), dataset.test_images_NHWC.ravel()]))
    np.testing.assert_array_equal(np.rint(pixels * 255 / 16), ours)


def test_cifar10_from_a_server(tmp_path: Path, files: Files) -> None:
    """Five training files in order, pixels channel after channel, names from batches.meta.txt."""
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    meta = fetch("cifar10", cifar10_config(files.url, archive), tmp_path / "cifar10", tmp_path / "dl")
    dataset = open_dataset(tmp_path / "cifar10")
    assert meta["class_names"] == NAMES
    assert dataset.train_images.shape == (50, 32, 32, 3)
    for at in range(5):
        _, images_NHWC, labels = cifar_records(10, 1, at + 1)
        np.testing.assert_array_equal(dataset.train_images[10 * at : 10 * at + 10], images_NHWC)
        np.testing.assert_array_equal(dataset.train_labels_N[10 * at : 10 * at + 10], labels)
    np.testing.assert_array_equal(dataset.test_images_NHWC, cifar_records(10, 1, 9)[1])
    assert left_behind(tmp_path / "dl") == ["cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz.lock"]


def test_a_second_fetch_downloads_nothing(tmp_path: Path, files: Files) -> None:
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    config = cifar10_config(files.url, archive)
    for _ in range(2):
        fetch("cifar10", config, tmp_path / "cifar10", tmp_path / "dl")
    assert len(files.requests) == 1


@pytest.mark.parametrize("as_folder", [True, False])
def test_cifar10_from_a_copy_on_disk(tmp_path: Path, as_folder: bool) -> None:
    archive = cifar10_archive()
    path = tmp_path / ("cifar-10-binary.tar.gz" if as_folder else "my copy.tgz")
    path.write_bytes(archive)
    source = str(tmp_path if as_folder else path)
    fetch("cifar10", cifar10_config(source, archive), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert len(open_dataset(tmp_path / "data" / "cifar10").train_labels_N) == 50


def test_cifar100_takes_the_fine_label(tmp_path: Path, files: Files) -> None:
    """Two label bytes a record, coarse then fine; names from fine_label_names.txt."""
    raw, images_NHWC, labels = cifar_records(20, 2, 3)
    archive = tar_of(
        {
            "cifar-100-binary/train.bin": raw,
            "cifar-100-binary/test.bin": cifar_records(10, 2, 4)[0],
            "cifar-100-binary/fine_label_names.txt": "\n".join(NAMES).encode(),
            "cifar-100-binary/coarse_label_names.txt": b"coarse",
        }
    )
    files.content["/cifar-100-binary.tar.gz"] = archive
    config = ArchiveConfig(source=files.url, sha256={"cifar-100-binary.tar.gz": sha256(archive)})
    fetch("cifar100", config, tmp_path / "cifar100", tmp_path / "dl")
    dataset = open_dataset(tmp_path / "cifar100")
    np.testing.assert_array_equal(dataset.train_labels_N, labels)
    np.testing.assert_array_equal(dataset.train_images, images_NHWC)


def svhn_files(seed: int) -> dict[str, tuple[bytes, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = {}
    for part, num in (("train", 30), ("extra", 40), ("test", 20)):
        images_NHWC = rng.integers(0, 256, size=(num, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(num) % 10
        stream = io.BytesIO()
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[
            :, None
        ]  # the format writes 10 for the digit 0
        savemat(stream, {"X": images_NHWC.transpose(1, 2, 3, 0), "y": y}, do_compression=True)
        made[part] = (stream.getvalue(), images_NHWC, labels)
    return made


def test_svhn_train_extra_and_test(tmp_path: Path, files: Files) -> None:
    """Training images are train, then extra, and meta.json keeps the border; the digit 0 is class 0."""
    made = svhn_files(0)
    for part, (raw, _, _) in made.items():
        files.content[f"/{part}_32x32.mat"] = raw
    digests = {f"{part}_32x32.mat": sha256(raw) for part, (raw, _, _) in made.items()}
    fetch("svhn", ArchiveConfig(source=files.url, sha256=digests), tmp_path / "svhn", tmp_path / "dl")
    dataset = open_dataset(tmp_path / "svhn")
    assert dataset.train_parts == (("train", 30), ("extra", 40))
    np.testing.assert_array_equal(dataset.train_images, np.concatenate([made["train"][1], made["extra"][1]]))
    np.testing.assert_array_equal(dataset.test_labels_N, made["test"][2])


def test_a_damaged_svhn_file_is_named(tmp_path: Path) -> None:
    made = svhn_files(0)
    for part, (raw, _, _) in made.items():
        (tmp_path / f"{part}_32x32.mat").write_bytes(raw[: len(raw) // 2] if part == "extra" else raw)
    digests = {f"{part}_32x32.mat": sha256((tmp_path / f"{part}_32x32.mat").read_bytes()) for part in made}
    with pytest.raises(DataError, match=r"extra_32x32\.mat"):
        fetch("svhn", ArchiveConfig(source=str(tmp_path), sha256=digests), tmp_path / "svhn", tmp_path / "dl")


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def fashion_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    made = {}
    for prefix, num in (("train", 30), ("t10k", 20)):
        made[f"{prefix}-images-idx3-ubyte"] = idx(rng.integers(0, 256, size=(num, 28, 28), dtype=np.uint8))
        made[f"{prefix}-labels-idx1-ubyte"] = idx((np.arange(num) % 10).astype(np.uint8))
    return made


def fashion_config(source: str) -> ArchiveConfig:
    return ArchiveConfig(source=source, sha256={name: sha256(raw) for name, raw in fashion_files().items()})


@pytest.mark.parametrize("kind", ["server", "packed", "unpacked"])
def test_fashion_mnist_however_it_is_packed(tmp_path: Path, files: Files, kind: str) -> None:
    """The digest is of the unpacked bytes, so any compression level and plain files will do."""
    for name, raw in fashion_files().items():
        packed = gzip.compress(raw, compresslevel=1, mtime=5)
        files.content[f"/{name}.gz"] = packed
        (tmp_path / (name if kind == "unpacked" else f"{name}.gz")).write_bytes(
            raw if kind == "unpacked" else packed
        )
    source = files.url if kind == "server" else str(tmp_path)
    meta = fetch(
        "fashion-mnist", fashion_config(source), tmp_path / "data" / "fashion-mnist", tmp_path / "dl"
    )
    assert (meta["image_size"], meta["channels"], meta["num_train"]) == ([28, 28], 1, 30)
    assert meta["class_names"][9] == "Ankle boot"


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


def test_a_broken_connection_is_resumed(tmp_path: Path, files: Files) -> None:
    """The second request asks for the rest, and the file is right."""
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    files.cut_after, files.cuts_left = 40_000, 1
    fetch("cifar10", cifar10_config(files.url, archive), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert [wanted for _, wanted in files.requests] == [None, "bytes=32768-"]  # whole chunks of 16,384


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
    assert files.requests[-1][1] == "bytes=32768-"


def test_a_server_without_ranges_sends_everything_again(tmp_path: Path, files: Files) -> None:
    archive = cifar10_archive()
    files.content["/cifar-10-binary.tar.gz"] = archive
    files.cut_after, files.cuts_left, files.knows_ranges = 40_000, 1, False
    fetch("cifar10", cifar10_config(files.url, archive), tmp_path / "data" / "cifar10", tmp_path / "dl")
    assert len(open_dataset(tmp_path / "data" / "cifar10").train_labels_N) == 50


def cifar100_archive() -> bytes:
    return tar_of(
        {
            "cifar-100-binary/train.bin": cifar_records(60, 2, 3)[0],
            "cifar-100-binary/test.bin": cifar_records(10, 2, 4)[0],
            "cifar-100-binary/fine_label_names.txt": "\n".join(NAMES).encode(),
        }
    )


def published(dataset: str) -> dict[str, bytes]:
    """The files of a data set, small, in the true formats, by name."""
    if dataset == "svhn":
        return {f"{part}_32x32.mat": raw for part, (raw, _, _) in svhn_files(0).items()}
    archive = cifar10_archive() if dataset == "cifar10" else cifar100_archive()
    return {f"cifar-{dataset.removeprefix('cifar')}-binary.tar.gz": archive}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "svhn"])
@pytest.mark.parametrize(
    "trouble", ["none", "wrong digest", "resumed", "truncated", "truncated with its digest"]
)
def test_each_published_set_from_a_server(tmp_path: Path, files: Files, dataset: str, trouble: str) -> None:
    """Right and resumed: the data set. Otherwise one error that names the file, and nothing left."""
    made = published(dataset)
    name = next(iter(made))
    digests = {each: sha256(raw) for each, raw in made.items()}
    if trouble == "wrong digest":
        made[name] = made[name][:-1] + bytes([made[name][-1] ^ 1])
    elif trouble == "resumed":
        files.cut_after, files.cuts_left = 40_000, 1
    elif trouble.startswith("truncated"):
        made[name] = made[name][:20_000]
        if trouble == "truncated with its digest":
            digests[name] = sha256(made[name])
    files.content = {f"/{each}": raw for each, raw in made.items()}
    config = ArchiveConfig(source=files.url, sha256=digests)
    if trouble in ("none", "resumed"):
        fetch(dataset, config, tmp_path / "data" / dataset, tmp_path / "dl")
        assert open_dataset(tmp_path / "data" / dataset).class_names[:1] in ((NAMES[0],), ("0",))
        resumed = [wanted for _, wanted in files.requests if wanted == "bytes=32768-"]
        assert len(resumed) == (trouble == "resumed")
    else:
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            fetch(dataset, config, tmp_path / "data" / dataset, tmp_path / "dl")
        assert left_behind(tmp_path / "data") == []


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
    (tmp_path / ".digits.abc.tmp").mkdir()
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

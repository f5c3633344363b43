"""Every data set from a loopback server or from disk, in the true formats."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from loopback import Files
from published_sets import (
    NAMES,
    cifar10_archive,
    cifar10_config,
    cifar_records,
    fashion_config,
    fashion_files,
    left_behind,
    published,
    sha256,
    svhn_files,
    tar_of,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sdpipe.config import read_params
from sdpipe.data.config import DATASET_SECTIONS, ArchiveConfig, DigitsConfig
from sdpipe.data.fetch import _FETCHERS, fetch
from sdpipe.data.store import open_dataset
from sdpipe.errors import DataError


def test_each_data_set_of_the_params_can_be_fetched() -> None:
    assert _FETCHERS.keys() == DATASET_SECTIONS.keys() == read_params(ROOT / "params.yaml")["fetch"].keys()


def test_digits_are_scikit_learns_at_256_levels(tmp_path: Path) -> None:
    """1,797 digits, a fifth held out, stratified, by the seed; level 16 becomes 255."""
    meta = fetch("digits", DigitsConfig(test_fraction=0.2, seed=3), tmp_path / "digits", tmp_path / "dl")
    dataset = open_dataset(tmp_path / "digits")
    assert (meta["num_train"], meta["num_test"]) == (1437, 360)
    assert max(meta["test_images_per_class"]) - min(meta["test_images_per_class"]) <= 2
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(range(1797), test_size=360, random_state=3, stratify=labels)
    train, test = (sorted(part) for part in parts)
    np.testing.assert_array_equal(dataset.train_images.reshape(-1, 64), np.rint(pixels[train] * 255 / 16))
    np.testing.assert_array_equal(dataset.test_images_NHWC.reshape(-1, 64), np.rint(pixels[test] * 255 / 16))
    np.testing.assert_array_equal(dataset.test_labels_N, labels[test])


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


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("mirror/?sig=SECRET", "/mirror/cifar-10-binary.tar.gz?sig=SECRET"),
        ("mirror?sig=SECRET/", "/mirror/cifar-10-binary.tar.gz?sig=SECRET/"),
        ("mirror/#part", "/mirror/cifar-10-binary.tar.gz"),
        ("CIFAR.TAR.GZ?sig=SECRET", "/CIFAR.TAR.GZ?sig=SECRET"),
    ],
)
def test_a_source_with_a_query(tmp_path: Path, files: Files, source: str, asked: str) -> None:
    """The archive's name belongs into the path; a mirror's token is neither kept nor shown."""
    archive = cifar10_archive()
    files.content[asked] = archive
    config = cifar10_config(files.url + source, archive)
    meta = fetch("cifar10", config, tmp_path / "cifar10", tmp_path / "dl")
    assert meta["source"]["source"] == files.url + re.split("[?#]", source)[0]
    files.content[asked] = b"another"
    with pytest.raises(DataError, match="SHA-256 expected") as caught:
        fetch("cifar10", config, tmp_path / "cifar10", tmp_path / "empty")
    assert "SECRET" not in str(caught.value)


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


@pytest.mark.slow
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
        resumed = [wanted for _, wanted in files.requests if wanted == "bytes=40000-"]
        assert len(resumed) == (trouble == "resumed")
    else:
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            fetch(dataset, config, tmp_path / "data" / dataset, tmp_path / "dl")
        assert left_behind(tmp_path / "data") == []

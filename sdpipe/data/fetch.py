"""Fetch one data set: from its source to data/<dataset>/, or nothing at all."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from sdpipe.config import Section
from sdpipe.data.archives import read_gzip, unpack
from sdpipe.data.config import (
    ArchiveConfig,
    DigitPicturesConfig,
    DigitsConfig,
    ImageFolderConfig,
    ImageNetConfig,
    check_apart,
)
from sdpipe.data.formats import read_cifar, read_idx, read_svhn
from sdpipe.data.imagefolder import hold_out_test, list_pictures, refuse_unreadable, write_pictures
from sdpipe.data.sources import as_shown, has_sha256, is_url, locate
from sdpipe.data.split import split_stratified
from sdpipe.data.store import PICTURES, write_files, write_meta, write_part
from sdpipe.errors import DataError
from sdpipe.files import local_path, replacing_folder

DIGITS_MAX = 16  # scikit-learn's digits have 17 grey levels, 0..16
DIGIT_PICTURE_PX = 40  # of a digit as a picture file, enlarged from 8
RGB = 3  # channels
MAX_IDX_BYTES = 2**28  # what little may unpack to; Fashion-MNIST's largest file has 47,040,016

FASHION_MNIST_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
"""Label order of https://github.com/zalandoresearch/fashion-mnist."""


def fetch(dataset: str, config: Section, folder: Path, downloads: Path) -> dict[str, Any]:
    """Fetch data set `dataset` into `folder`. Returns the content of its meta.json.

    downloads: where downloaded files are kept and continued.
    The folder appears only when everything is in it and checked. Raises DataError naming the file, and
    ConfigError if the source lies in the project's folder for that data set.
    """
    check_apart(dataset, config)
    with replacing_folder(folder) as beside:
        return _FETCHERS[dataset](config, beside, downloads)


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797: uint8 (N, 8, 8, 1), int64 (N,)."""
    pixels, labels_N = load_digits(return_X_y=True)
    return np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / DIGITS_MAX)).astype(np.uint8), labels_N


def _fetch_digits(config: DigitsConfig, folder: Path, _downloads: Path) -> dict[str, Any]:
    images_NHWC, labels_N = _load_digits()
    train, test = split_stratified(labels_N.tolist(), config.test_fraction, config.seed, "fetch.digits")
    for part, indices in (("train", train), ("test", test)):
        write_part(folder, part, [(images_NHWC[indices], labels_N[indices])])
    return write_meta(
        folder,
        name="digits",
        class_names=[str(digit) for digit in range(10)],
        source={"source": "sklearn.datasets.load_digits"},
    )


def _fetch_fashion_mnist(config: ArchiveConfig, folder: Path, downloads: Path) -> dict[str, Any]:
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images_NHW = _read_checked_idx(config, f"{prefix}-images-idx3-ubyte", downloads)
        labels_N = _read_checked_idx(config, f"{prefix}-labels-idx1-ubyte", downloads)
        if images_NHW.ndim != 3 or labels_N.shape != images_NHW.shape[:1]:
            raise DataError(f"fashion-mnist: {images_NHW.shape} images for {labels_N.shape} {part} labels")
        write_part(folder, part, [(images_NHW[..., np.newaxis], labels_N.astype(np.int64))])
    return write_meta(
        folder,
        name="fashion-mnist",
        class_names=FASHION_MNIST_CLASSES,
        source={"source": as_shown(config.source), "sha256_unpacked": config.sha256},
    )


def _read_checked_idx(config: ArchiveConfig, name: str, downloads: Path) -> np.ndarray:
    """Compression differs between mirrors, so the digest is that of the unpacked bytes."""
    expected = _digest_of(config, name)

    def check(path: Path, shown: str) -> None:
        if (found := hashlib.sha256(read_gzip(path, MAX_IDX_BYTES)).hexdigest()) != expected:
            raise DataError(f"{shown}: SHA-256 of the unpacked bytes expected {expected}, found {found}")

    unpacked = not is_url(config.source) and (local_path(config.source) / name).is_file()
    path = locate(config.source, name if unpacked else f"{name}.gz", downloads, check)
    return read_idx(read_gzip(path, MAX_IDX_BYTES), name)


def _digest_of(config: ArchiveConfig, name: str) -> str:
    if name not in config.sha256:
        raise DataError(f"{name}: no digest for it in params.yaml")
    return config.sha256[name]


def _fetch_cifar(config: ArchiveConfig, folder: Path, downloads: Path, classes: int) -> dict[str, Any]:
    if classes == 10:
        label_bytes, names_file = 1, "batches.meta.txt"
        patterns = {"train": "data_batch_*.bin", "test": "test_batch.bin"}
    else:
        label_bytes, names_file = 2, "fine_label_names.txt"
        patterns = {"train": "train.bin", "test": "test.bin"}
    name = f"cifar-{classes}-binary.tar.gz"
    archive = locate(config.source, name, downloads, has_sha256(_digest_of(config, name)))
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        unpack(archive, Path(unpacked))
        for part, pattern in patterns.items():
            files = _find(archive, Path(unpacked), pattern)
            write_part(folder, part, [read_cifar(file, label_bytes) for file in files])
        class_names = _read_names(_find(archive, Path(unpacked), names_file)[0])
    return write_meta(
        folder,
        name=f"cifar{classes}",
        class_names=class_names,
        source={"source": as_shown(config.source), "sha256": config.sha256},
    )


def _find(archive: Path, unpacked: Path, pattern: str) -> list[Path]:
    files = sorted(path for path in unpacked.rglob(pattern) if path.is_file())
    if not files:
        raise DataError(f"{archive}: holds no {pattern}")
    return files


def _read_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: expected class names in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _fetch_svhn(config: ArchiveConfig, folder: Path, downloads: Path) -> dict[str, Any]:
    parts = {}
    for part in ("train", "extra", "test"):
        name = f"{part}_32x32.mat"
        parts[part] = read_svhn(locate(config.source, name, downloads, has_sha256(_digest_of(config, name))))
    write_part(folder, "train", [parts["train"], parts["extra"]])
    write_part(folder, "test", [parts["test"]])
    return write_meta(
        folder,
        name="svhn",
        class_names=[str(digit) for digit in range(10)],
        source={"source": as_shown(config.source), "sha256": config.sha256},
        train_parts=[(part, len(parts[part][1])) for part in ("train", "extra")],
    )


def _fetch_imagefolder(config: ImageFolderConfig, folder: Path, downloads: Path) -> dict[str, Any]:
    local = local_path(config.source)
    if not is_url(config.source) and not local.is_file():
        if config.sha256 is not None:
            raise DataError("fetch.imagefolder.sha256: is for an archive; expected null for a folder")
        return _read_tree(local, config, folder)
    check = None if config.sha256 is None else has_sha256(config.sha256)
    archive = locate(config.source, "", downloads, check)
    shown = as_shown(config.source) if is_url(config.source) else str(archive)
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        try:
            unpack(archive, Path(unpacked))
            return _read_tree(Path(unpacked), config, folder)
        except DataError as error:  # the place where it was unpacked is gone when this is read
            raise DataError(str(error).replace(unpacked, shown).replace(str(archive), shown)) from error
        finally:
            if is_url(config.source) and check is None:
                archive.unlink(missing_ok=True)  # it would be downloaded again all the same


def _read_tree(tree: Path, config: ImageFolderConfig, folder: Path) -> dict[str, Any]:
    listing = list_pictures(tree)
    train, validation = listing.splits["train"], listing.splits.get("validation", [])
    if "test" in listing.splits:
        test = listing.splits["test"]
    else:
        train, test = hold_out_test(train, config.test_fraction, config.seed)
    size_HW = (config.image_size, config.image_size)
    unreadable = write_pictures(folder, "train", train + validation, size_HW, config.channels)
    unreadable += write_pictures(folder, "test", test, size_HW, config.channels)
    refuse_unreadable(unreadable)
    return write_meta(
        folder,
        name="imagefolder",
        class_names=listing.class_names,
        source={"source": as_shown(config.source), "num_ignored_files": listing.num_ignored},
        train_parts=_parts(train, validation),
    )


def _fetch_imagenet(config: ImageNetConfig, folder: Path, _downloads: Path) -> dict[str, Any]:
    root = local_path(config.source)
    if is_url(config.source) or root.is_file():
        raise DataError(
            f"{as_shown(config.source)}: expected a folder, since the pictures stay in their files"
        )
    return _list_tree(root, config, folder, name="imagenet", source=config.source)


def _fetch_digit_pictures(config: DigitPicturesConfig, folder: Path, _downloads: Path) -> dict[str, Any]:
    images_NHWC, labels_N = _load_digits()
    train, test = split_stratified(
        labels_N.tolist(), config.test_fraction, config.seed, "fetch.digit-pictures"
    )
    for part, numbers in (("train", train), ("val", test)):
        for number in numbers:
            path = folder / PICTURES / part / str(labels_N[number]) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(images_NHWC[number, ..., 0])
            picture.resize((DIGIT_PICTURE_PX, DIGIT_PICTURE_PX), Image.Resampling.BILINEAR).save(path)
    return _list_tree(folder / PICTURES, config, folder, name="digit-pictures", source=None)


def _list_tree(
    tree: Path, config: ImageNetConfig | DigitPicturesConfig, folder: Path, *, name: str, source: str | None
) -> dict[str, Any]:
    """Training pictures as a table of files, test pictures as an array."""
    listing = list_pictures(tree)
    splits = listing.splits
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")  # ImageNet's errors are those of its validation images
    if "test" not in splits:
        raise DataError(f"{tree / 'val'}: no such folder; expected train and val, as ImageNet has them")
    validation = splits.get("validation", [])
    write_files(folder, splits["train"] + validation, tree)
    size_HW, crop_fraction = (config.image_size, config.image_size), config.image_size / config.resize
    refuse_unreadable(write_pictures(folder, "test", splits["test"], size_HW, RGB, crop_fraction))
    return write_meta(
        folder,
        name=name,
        class_names=listing.class_names,
        source={"source": source or "sklearn.datasets.load_digits", "num_ignored_files": listing.num_ignored},
        train_parts=_parts(splits["train"], validation),
        train_root=source,
        crop_fraction=crop_fraction,
    )


def _parts(train: list[Any], validation: list[Any]) -> list[tuple[str, int]]:
    return [("train", len(train))] + ([("validation", len(validation))] if validation else [])


_FETCHERS: dict[str, Callable[[Any, Path, Path], dict[str, Any]]] = {
    "digits": _fetch_digits,
    "fashion-mnist": _fetch_fashion_mnist,
    "cifar10": lambda config, folder, downloads: _fetch_cifar(config, folder, downloads, 10),
    "cifar100": lambda config, folder, downloads: _fetch_cifar(config, folder, downloads, 100),
    "svhn": _fetch_svhn,
    "imagefolder": _fetch_imagefolder,
    "imagenet": _fetch_imagenet,
    "digit-pictures": _fetch_digit_pictures,
}

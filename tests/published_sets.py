"""The published data sets in little, in their true formats."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from scipy.io import savemat

from sdpipe.data.config import ArchiveConfig


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

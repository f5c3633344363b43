"""What this machine has, and whether it works: for people, and for their bug reports."""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np

from sdpipe.errors import ModelError, SdpipeError, without_passwords
from sdpipe.provenance import counted
from sdpipe.runtime.artifact import num_cuda_devices, open_artifact, provider_works
from sdpipe.runtime.cores import num_cores
from sdpipe.version import __version__

# Where sdpipe runs without being installed, nothing says what it needs.
_BASE = ["click", "numpy", "Pillow", "onnxruntime-gpu"]
_TRAIN = ["torch", "torchvision", "onnx", "onnxscript", "safetensors", "mlflow", "dvc"]
_LOW_DISK_BYTES = 2 * 2**30
_SQLITE = b"SQLite format 3\0"  # how its files begin


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `ok` is False where something will fail."""

    name: str
    finding: str
    ok: bool = True


def report() -> Iterator[Check]:
    """All findings, one after the other; each is there as soon as it is known."""
    yield Check(
        name="sdpipe", finding=f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    yield from _packages()
    if _version("onnxruntime") is not None:
        yield Check(
            name="onnxruntime", finding="installed beside onnxruntime-gpu in one folder: keep one", ok=False
        )
    cores = counted(num_cores(), "core")
    yield Check(name="processor", finding=f"{platform.machine()}, {cores} for this process")
    yield _training_device()
    yield Check(name="CUDA driver", finding=counted(num_cuda_devices(), "device"))
    yield _provider("CPUExecutionProvider")
    if num_cuda_devices():
        yield _provider("CUDAExecutionProvider")
    yield _model(Path(os.environ.get("SDPIPE_MODEL") or "models/model.onnx"))
    yield from _stores()
    free = shutil.disk_usage(Path.cwd()).free
    yield Check(
        name="disk", finding=f"{free / 2**30:.1f} GiB free in {Path.cwd()}", ok=free > _LOW_DISK_BYTES
    )


def _packages() -> Iterator[Check]:
    """Those that predictions need, then those that trainings need; the other extras are of no command."""
    try:
        requirements = requires("sdpipe") or []
    except PackageNotFoundError:
        base, train = _BASE, _TRAIN
    else:
        base, train = _named(requirements, []), _named(requirements, ["train"])
    yield from (_package(name, needed=True) for name in base)
    yield from (_package(name, needed=False) for name in train)


def _named(requirements: Iterable[str], extras: list[str]) -> list[str]:
    """The names in lines such as `torch>=2.14; extra == "train"`, of those with just these extras.

    https://packaging.python.org/en/latest/specifications/dependency-specifiers/
    """
    return [
        re.split(r"[^\w.-]", each)[0]
        for each in requirements
        if re.findall(r"extra == .(\w+)", each) == extras
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _package(name: str, *, needed: bool) -> Check:
    found = _version(name)
    if found is not None:
        return Check(name=name, finding=found)
    return Check(
        name=name, finding="missing" if needed else "not installed; needed to train only", ok=not needed
    )


def _provider(name: str) -> Check:
    works = provider_works(name)
    return Check(
        name="onnxruntime provider", finding=f"{name} {'works' if works else 'does not work'}", ok=works
    )


def _training_device() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check(name="training device", finding="none, PyTorch is not installed")
    from sdpipe.training.compute import choose_compute

    return Check(name="training device", finding=choose_compute("auto", "auto").reason)


def _model(path: Path) -> Check:
    try:
        if path.is_dir():
            raise ModelError(f"{path}: expected a model file, found a folder")
        if not path.exists() and os.environ.get("SDPIPE_MODEL"):
            raise ModelError(f"SDPIPE_MODEL: {path}: no such file")
        if not path.exists():
            return Check(name="model", finding=f"{path} is not there yet; `make repro` makes it")
        artifact = open_artifact(path)
        height, width = artifact.metadata.image_size
        artifact.run(np.zeros((1, height, width, artifact.metadata.channels), dtype=np.uint8))
    except (SdpipeError, OSError) as error:
        return Check(name="model", finding=str(error), ok=False)
    return Check(name="model", finding=f"{path} runs on {', '.join(artifact.providers)}")


def _stores() -> Iterator[Check]:
    uri = without_passwords(os.environ.get("MLFLOW_TRACKING_URI", ""))
    store = Path("mlflow.db")
    if uri:
        yield Check(name="MLflow store", finding=f"{uri} (not tried)")
    elif store.exists() and not _is_sqlite(store):
        yield Check(name="MLflow store", finding=f"{store.resolve()} is no SQLite database", ok=False)
    else:
        is_made = store.exists() and store.stat().st_size > 0  # what makes it takes an empty file for none
        yield Check(name="MLflow store", finding=str(store.resolve()) if is_made else "not made yet")
    if importlib.util.find_spec("dvc") is not None:
        yield _dvc()


def _dvc() -> Check:
    """By DVC's own rules: its repository and git's may be in a folder above, and core.no_scm goes without."""
    from dvc.config import Config
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import SCM, SCMError

    try:
        root = Repo.find_root()
        SCM(root, no_scm=Config.from_cwd()["core"].get("no_scm", False)).close()
    except NotDvcRepoError:
        return Check(name="DVC", finding="no DVC repository here")
    except SCMError as error:
        how = "`git init` makes one" if shutil.which("git") else "install git, and `git init` makes one"
        return Check(name="DVC", finding=f"{error}, which DVC needs; {how}", ok=False)
    except (DvcException, OSError, ValueError) as error:  # the latter of files that git or DVC cannot parse
        return Check(name="DVC", finding=str(error), ok=False)
    return Check(name="DVC", finding=f"repository {root}")


def _is_sqlite(path: Path) -> bool:
    """By its first bytes; an empty file is a database without a table."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_SQLITE)) in (b"", _SQLITE)
    except OSError:
        return False

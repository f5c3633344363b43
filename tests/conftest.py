"""Small nets and data for all tests. Each test gets a project of its own, and no network."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import prompt_start
import pytest
import torch
from loopback import Files, serve
from safetensors.torch import save

from sdpipe.data import sources
from sdpipe.data.augment import Normalisation
from sdpipe.data.store import DataSet, open_dataset, write_meta, write_part
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_network
from sdpipe.deploy.fold import fold_weights
from sdpipe.network import NetworkConfig, ResNet, initialise
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.config import CheckpointConfig, MachineConfig, TrainConfig
from sdpipe.training.interruption import Interruption
from sdpipe.training.loop import OnEpoch, train
from sdpipe.training.progress import TrainResult
from sdpipe.training.trainer import Trainer
from sdpipe.training.weights import ModelInfo, Weights
from sdpipe.training.world import World

ROOT = Path(__file__).resolve().parent.parent
CLASS_NAMES = ("cat", "dog", "eel")
SIZE = 9  # odd on purpose: 9, 5, 3
CPU = choose_compute("cpu", "fp32")
ALONE = World(0, 1, 0)

LONGEST = ("test_pipeline.py", "test_world.py", "test_recipe_steps.py", "test_queue.py", "test_soak.py")

prompt_start.done()
torch.set_num_threads(1)  # nets this small wait for a second thread longer than it saves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, lest one process wait for the other at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def project(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder that counts as the project's root; nothing tracks anywhere else."""
    folder = tmp_path_factory.mktemp("project")
    torch.set_num_threads(1)  # a benchmark that was tested may have left more
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DVC_ROOT", str(folder))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "SDPIPE_MODEL", "SDPIPE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    return folder


def make_weights(
    *,
    family: str = "cifar",
    depth: int = 20,
    widths: tuple[int, ...] = (4, 8, 16),
    skip: str = "A",
    channels: int = 1,
    p_L: float = 0.5,
    seed: int = 0,
    removed: Collection[int] = (),
) -> Weights:
    """A network whose BatchNorm statistics and biases are as uneven as trained ones.

    removed: blocks (l = 1..L) that its test network lacks.
    """
    config = NetworkConfig(
        family=family,
        depth=depth,
        widths=widths,
        skip=skip,
        dropout=0.1 if skip == "B" else 0.0,
        rule="linear_decay",
        p_L=p_L,
        in_channels=channels,
        num_classes=3,
    )
    network = ResNet(config)
    initialise(network, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.2, 2, generator=generator)
                module.weight.uniform_(0.3, 1.2, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
        network.head.bias.normal_(0, 0.2, generator=generator)
    mean_HWC = torch.rand((SIZE, SIZE, channels), generator=generator) * 200
    return Weights(
        info=ModelInfo(
            network=config,
            scales=tuple(
                0.0 if ell in removed else prob for ell, prob in enumerate(config.survival_probs, start=1)
            ),
            dataset="animals",
            dataset_digest="d" * 64,
            class_names=CLASS_NAMES,
            image_size=(SIZE, SIZE),
            crop_fraction=1.0,
            fingerprint="0123456789abcdef",
            best_epoch=1,
            train_params={"p_L": p_L},
        ),
        normalisation=Normalisation(mean_HWC=mean_HWC, std=torch.tensor(60.0)),
        state=network.state_dict(),
    )


@pytest.fixture(scope="session")
def weights() -> Weights:
    return make_weights()


@pytest.fixture(scope="session")
def rgb_weights() -> Weights:
    return make_weights(channels=3, seed=1)


def export_anew(path: Path, weights: Weights, temperature: float = 1.0) -> Path:
    export_network(fold_weights(weights), path, ExportConfig(opset=20), temperature=temperature)
    return path


_EXPORTED: dict[str, bytes] = {}


def export_to(path: Path, weights: Weights, temperature: float = 1.0) -> Path:
    """As `export_anew`, but what was exported once in a session is not again: it takes seconds."""
    folded = fold_weights(weights)
    statistics = {"mean": folded.normalisation.mean_HWC, "std": folded.normalisation.std}
    tensors = {name: tensor.contiguous() for name, tensor in {**folded.state, **statistics}.items()}
    key = hashlib.sha256(save(tensors) + repr((folded.info, temperature)).encode()).hexdigest()
    if key not in _EXPORTED:
        _EXPORTED[key] = export_anew(path, weights, temperature).read_bytes()
    path.write_bytes(_EXPORTED[key])
    return path


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    """A deployed file for grey images."""
    return export_to(tmp_path_factory.mktemp("model") / "model.onnx", weights)


@pytest.fixture(scope="session")
def rgb_model_path(tmp_path_factory: pytest.TempPathFactory, rgb_weights: Weights) -> Path:
    """A deployed file for RGB images."""
    return export_to(tmp_path_factory.mktemp("rgb_model") / "model.onnx", rgb_weights)


def random_images(num: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size=(num, SIZE, SIZE, channels), dtype=np.uint8)


def make_dataset(
    folder: Path, *, num_train: int = 120, num_test: int = 30, seed: int = 0, size: int = SIZE
) -> DataSet:
    """Three classes that a small net can learn: bright rows, bright columns, noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, num in (("train", num_train), ("test", num_test)):
        labels_N = np.arange(num) % 3
        images_NHWC = rng.integers(0, 80, size=(num, size, size, 1), dtype=np.uint8)
        for at, label in enumerate(labels_N):
            line = rng.integers(1, size - 1)
            if label == 0:
                images_NHWC[at, line] += 150
            elif label == 1:
                images_NHWC[at, :, line] += 150
        write_part(folder, part, [(images_NHWC, labels_N)])
    write_meta(folder, name="animals", class_names=list(CLASS_NAMES), source={})
    return open_dataset(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_dataset(tmp_path_factory.mktemp("data"))


def train_config(**overrides: object) -> TrainConfig:
    """A training of seconds."""
    values = {
        "dataset": "animals",
        "seed": 0,
        "validation": 0.2,
        "family": "cifar",
        "depth": 20,
        "widths": [4, 8, 8],
        "skip": "A",
        "dropout": 0.0,
        "rule": "linear_decay",
        "p_L": 0.5,
        "p_L_warmup_epochs": 0,
        "draw": "batch",
        "epochs": 3,
        "batch_size": 16,
        "validate_steps": 0,
        "micro_batches": 1,
        "learning_rate": 0.1,
        "milestones": [2],
        "plateau_epochs": 0,
        "drop_factor": 10.0,
        "warmup": {"epochs": 0, "learning_rate": 0.01},
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "normalisation": "pixel",
        "crop": None,
        "colour_jitter": 0.0,
        "lighting": 0.0,
        "shift_px": 1,
        "flip": True,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "recompute": False,
    }
    return TrainConfig.model_validate(values | overrides)


def machine(*, every_s: float = 1000.0, every_steps: int = 0) -> MachineConfig:
    """Checkpoints at the end of a training, and when asked for."""
    checkpoint = CheckpointConfig(every_s=every_s, every_steps=every_steps)
    return MachineConfig(launch=None, workers=None, checkpoint=checkpoint)


def train_alone(
    config: TrainConfig,
    dataset: DataSet,
    folder: Path,
    *,
    every_steps: int = 0,
    on_epoch: OnEpoch = lambda _progress: None,
    interruption: Interruption | None = None,
    compute: Compute = CPU,
) -> TrainResult:
    """`train()` in this process, continuing from what is in `folder`, as a session does it."""
    checkpoints = CheckpointFolder(folder, "0123456789abcdef")
    return train(
        config,
        dataset,
        compute,
        World(0, 1, 0),
        checkpoints=checkpoints,
        machine=machine(every_steps=every_steps),
        start=checkpoints.load_newest()[0],
        on_epoch=on_epoch,
        interruption=interruption or Interruption(lambda: None),
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it none."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    SqlAlchemyStore(f"sqlite:///{path}", str(path.parent / "artifacts"))
    return path


@pytest.fixture
def mlflow_store(project: Path, empty_store: Path) -> Path:
    """The project's own store, empty."""
    shutil.copy(empty_store, project / "mlflow.db")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return project / "mlflow.db"


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """To the bit, wherever the tensors are."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].cpu(), second[name].cpu()) for name in first
    )


def run_epoch(trainer: Trainer) -> None:
    for _ in trainer.steps():
        pass
    trainer.validate()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """A file server on loopback, for data sets to be fetched from."""
    monkeypatch.setattr(sources, "ATTEMPTS", 2)  # of 4, so that failures take a second
    with serve() as served:
        yield served

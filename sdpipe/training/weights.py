"""The weights file: what was trained, and everything needed to build and feed it again, without pickle."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sdpipe.data.augment import Normalisation
from sdpipe.errors import ModelError
from sdpipe.files import replacing
from sdpipe.network import NetworkConfig, ResidualBlock, ResNet

_NETWORK = "network."
_META = "sdpipe"  # safetensors metadata is text to text; ours is one JSON text


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the tensors do not say of themselves."""

    network: NetworkConfig
    scales: tuple[float, ...]  # s_l of each branch in the test network: p_l (eq. 5); 0: the block is removed
    dataset: str
    dataset_digest: str  # SHA-256 over the arrays
    class_names: tuple[str, ...]
    image_size: tuple[int, int]  # height, width
    crop_fraction: float  # of pictures that are not of that size
    fingerprint: str
    best_epoch: float  # of lowest validation error, counted from 1
    train_params: dict[str, Any]  # the run's section of params.yaml


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A state dict, the normalisation that belongs to it, and what it is."""

    info: ModelInfo
    normalisation: Normalisation
    state: dict[str, Tensor]

    def build_network(self) -> ResNet:
        """The trained network on the CPU, float32, in eval mode."""
        network = new_network(self.info)
        network.load_state_dict(self.state)
        return network.eval()


def new_network(info: ModelInfo) -> ResNet:
    """An untrained network of that description, whose test network has its scales."""
    network = ResNet(info.network)
    for block, scale in zip(network.blocks, info.scales, strict=True):
        assert isinstance(block, ResidualBlock)
        block.survival_prob = scale
    return network


def save_weights(path: Path, weights: Weights) -> None:
    """Write a safetensors file; the same weights give the same bytes."""
    tensors = {
        **{_NETWORK + name: tensor for name, tensor in weights.state.items()},
        "normalisation.mean_HWC": weights.normalisation.mean_HWC,
        "normalisation.std": weights.normalisation.std,
    }
    save_tensors(path, tensors, asdict(weights.info))


def load_weights(path: Path) -> Weights:
    """Read what `save_weights` wrote.

    Raises ModelError if it is missing, damaged or foreign, or if a number in it is not finite.
    """
    tensors, meta = load_tensors(path)
    info = _info(path, meta)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: {name} holds numbers that are not finite; it is damaged")
    try:
        normalisation = Normalisation(
            mean_HWC=tensors.pop("normalisation.mean_HWC"), std=tensors.pop("normalisation.std")
        )
    except KeyError as error:
        raise _foreign(path, error) from error
    state = {name.removeprefix(_NETWORK): tensor for name, tensor in tensors.items()}
    return Weights(info=info, normalisation=normalisation, state=state)


def load_info(path: Path) -> ModelInfo:
    """What `save_weights` wrote beside the tensors, which are not read. Raises ModelError as it does."""
    with _readable(path), safe_open(path, framework="pt", device="cpu") as file:
        meta = json.loads((file.metadata() or {})[_META])
    return _info(path, meta)


def _info(path: Path, meta: dict[str, Any]) -> ModelInfo:
    try:
        network = NetworkConfig(**{**meta["network"], "widths": tuple(meta["network"]["widths"])})
        tuples = {name: tuple(meta[name]) for name in ("scales", "class_names", "image_size")}
        return ModelInfo(**{**meta, "network": network, **tuples})
    except (KeyError, TypeError) as error:
        raise _foreign(path, error) from error


def _foreign(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: no weights of sdpipe: {error} missing or unexpected")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors (any device, any layout) and a JSON-able description."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        # save_file() would turn a full disk into an error of its own kind.
        beside.write_bytes(save(plain, metadata={_META: json.dumps(meta)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote, to the CPU. Raises ModelError naming the file."""
    with _readable(path), safe_open(path, framework="pt", device="cpu") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads((file.metadata() or {})[_META])
    return tensors, meta


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: not a readable weights file: {error}") from error


def snapshot(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict that later steps do not change.

    Without BatchNorm's counts of what it saw: nothing uses them, and of two processes each sees half.
    """
    return {
        name: torch.clone(tensor, memory_format=torch.preserve_format)
        for name, tensor in state.items()
        if not name.endswith(".num_batches_tracked")
    }

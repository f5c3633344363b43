"""Files of ensembles, and what PyTorch computes in their place."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import export_to

from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_ensemble
from sdpipe.training.weights import Weights


def export_ensemble_to(path: Path, weights: Weights, temperature: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    export_ensemble(weights, path, ExportConfig(opset=20), temperature=temperature)
    return path


def in_pytorch(weights: Weights, images_NHWC: np.ndarray, active: Sequence[bool] | None) -> np.ndarray:
    """Logits of the trained network, BatchNorm and p_l in their places, float64; None: the test network."""
    normalise = weights.normalisation
    images = (torch.from_numpy(images_NHWC).double() - normalise.mean_HWC.double()) / normalise.std.double()
    with torch.inference_mode():
        logits_NK: np.ndarray = weights.build_network().double()(images.permute(0, 3, 1, 2), active).numpy()
    return logits_NK


def switches(active: Sequence[float]) -> np.ndarray:
    return np.array(active, dtype=np.float32)


def deploy_ensemble(folder: Path, weights: Weights) -> Path:
    """A model and, in variants/, its ensemble, at temperature 1.5."""
    export_ensemble_to(folder / "variants" / "ensemble.onnx", weights, 1.5)
    return export_to(folder / "model.onnx", weights, 1.5)

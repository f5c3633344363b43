"""A run with all its variants, small enough to be made in seconds."""

from dataclasses import replace
from pathlib import Path

from conftest import export_to, make_weights
from test_evaluate import CONFIG, TEMPERATURE

from sdpipe.data.store import DataSet
from sdpipe.deploy.config import ExportConfig, QuantizeConfig
from sdpipe.deploy.export import export_ensemble, export_network
from sdpipe.deploy.fold import fold_weights
from sdpipe.deploy.quantize import quantize_run
from sdpipe.files import write_json
from sdpipe.training.weights import Weights, save_weights

QUANTIZE = QuantizeConfig(images=64, seed=0, methods=("minmax", "entropy", "percentile"), percentile=99.999)
QUICK = CONFIG.model_copy(update={"batch_sizes": (32,), "threads": (1,)})
REMOVED = (4, 8)


def of_dataset(weights: Weights, dataset: DataSet) -> Weights:
    info = replace(
        weights.info,
        dataset_digest=dataset.digest,
        best_epoch=2,
        train_params={"validation": 0.2, "seed": 0},
    )
    return replace(weights, info=info)


def make_quantized_run(folder: Path, dataset: DataSet) -> Path:
    """models/<run>/ as train, calibrate, export, prune and quantize leave it."""
    (folder / "pruned").mkdir(parents=True)
    write_json(folder / "calibration.json", {"temperature": TEMPERATURE})
    weights = of_dataset(make_weights(), dataset)
    pruned = of_dataset(make_weights(removed=REMOVED), dataset)
    save_weights(folder / "weights.safetensors", weights)
    export_to(folder / "model.onnx", weights, TEMPERATURE)
    export_ensemble(weights, folder / "ensemble.onnx", ExportConfig(opset=20), temperature=TEMPERATURE)
    save_weights(folder / "pruned" / "keep-7.safetensors", pruned)
    export_network(
        fold_weights(pruned),
        folder / "pruned" / "keep-7.onnx",
        ExportConfig(opset=20),
        temperature=TEMPERATURE,
        variant="keep-7",
    )
    size = {"name": "keep-7", "recalibrated": {"temperature": TEMPERATURE}}
    write_json(folder / "pruned" / "prune.json", {"sizes": [size]})
    quantize_run(folder, dataset, QUANTIZE)
    return folder

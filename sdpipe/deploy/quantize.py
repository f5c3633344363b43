"""Quantize: an exported file with 8-bit integers, for CPUs, and one with 16-bit floats, for GPUs.

int8 is onnxruntime's static quantisation in its QDQ form: each tensor and its range stand in the file as
QuantizeLinear and DequantizeLinear, and a runtime makes integer kernels of them. Weights are int8 with a
scale for each output channel, activations uint8, since ReLU leaves no negative ones and the CPU's
instructions take unsigned times signed. Normalisation, pooling, head and softmax stay float: they cost
nothing, and the head's logits cost accuracy (docs/quantization.md has the measurements).
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator, save_tensors_data
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from tqdm import tqdm

from sdpipe.data.store import DataSet
from sdpipe.deploy.confidence import divergence, error_fraction, negative_log_likelihood
from sdpipe.deploy.config import QuantizeConfig
from sdpipe.deploy.export import save_model
from sdpipe.deploy.files_of_run import FLOAT16, FP32, INT8, MODEL, PRUNED, PRUNED_INT8, WEIGHTS
from sdpipe.deploy.held_out import StoredImages, open_held_out
from sdpipe.deploy.proof.parity import onnx_logits
from sdpipe.files import replacing_folder, write_json
from sdpipe.runtime.artifact import INPUT, open_artifact
from sdpipe.runtime.metadata import Metadata
from sdpipe.training.weights import load_info

QUANTIZED = ("Add", "Conv", "MaxPool", "Relu")  # the operators of a file that become integers
HALVED = ("Add", "AveragePool", "Conv", "MaxPool", "Pad", "Relu")  # those that become float16
BATCH = 32  # images; what their activations need is held in memory
VALIDATION_BATCH = 256
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


def quantize_run(folder: Path, dataset: DataSet, config: QuantizeConfig) -> None:
    """The smaller files of models/<run>/, and quantize.json with what was chosen and why.

    model.onnx becomes model.int8.onnx and model.fp16.onnx, each pruned/<name>.onnx becomes
    pruned-int8/<name>.int8.onnx. Raises ModelError if a file cannot be read, DataError if the run was trained
    on other data.
    """
    trained, validated = open_held_out(load_info(folder / WEIGHTS), dataset)
    calibration = trained.sample(config.images, config.seed)
    facts: dict[str, Any] = {"num_calibration": len(calibration), "num_validation": len(validated)}
    model_path = folder / MODEL
    facts[INT8] = quantize_int8(model_path, folder / f"model.{INT8}.onnx", calibration, validated, config)
    halve(model_path, folder / f"model.{FLOAT16}.onnx")
    with replacing_folder(folder / PRUNED_INT8) as beside:
        for source in sorted((folder / PRUNED).glob("*.onnx")):
            name = f"{source.stem}.{INT8}"
            facts[name] = quantize_int8(source, beside / f"{name}.onnx", calibration, validated, config)
    write_json(folder / "quantize.json", facts)


def quantize_int8(
    source: Path, target: Path, calibration: StoredImages, validated: StoredImages, config: QuantizeConfig
) -> dict[str, Any]:
    """Write the int8 form of an exported file with the ranges that come closest to it on the validation part.

    Closest is the lowest divergence of its probabilities from those of `source`: of candidates that differ in
    one prediction of a hundred the errors differ by chance, by a few images. Returns the method that was
    chosen, and the figures of all of them and of `source`.
    """
    metadata = variant_of(source, INT8)
    exact_NK = _validation_logits(source, validated)
    figures = {"float": _figures(exact_NK, validated, metadata.temperature)}
    with tempfile.TemporaryDirectory() as scratch:
        for method in tqdm(config.methods, desc=source.name, unit="method", disable=None):
            ranges = observe_ranges(source, calibration.batches(BATCH), method, config.percentile)
            candidate = Path(scratch) / f"{method}.onnx"
            save_model(insert_ranges(source, ranges), candidate, metadata)
            logits_NK = _validation_logits(candidate, validated)
            figures[method] = {
                **_figures(logits_NK, validated, metadata.temperature),
                "divergence_from_float": divergence(exact_NK, logits_NK, metadata.temperature),
            }
        chosen = min(config.methods, key=lambda method: figures[method]["divergence_from_float"])
        save_model(onnx.load(Path(scratch) / f"{chosen}.onnx"), target, metadata)
    return {"method": chosen, "validation": figures}


def variant_of(source: Path, kind: str) -> Metadata:
    """The metadata of a file's int8 or fp16 form: `int8` of fp32, `keep-17.int8` of keep-17."""
    metadata = open_artifact(source, device="cpu").metadata
    name = kind if metadata.variant == FP32 else f"{metadata.variant}.{kind}"
    return Metadata(**{**vars(metadata), "variant": name})


def _validation_logits(path: Path, validated: StoredImages) -> np.ndarray:
    return onnx_logits(open_artifact(path, device="cpu"), validated, VALIDATION_BATCH)


def _figures(logits_NK: np.ndarray, validated: StoredImages, temperature: float) -> dict[str, float]:
    nll = negative_log_likelihood(logits_NK, validated.labels_N, temperature)
    return {"validation_error": error_fraction(logits_NK, validated.labels_N), "nll": nll}


class _Batch(CalibrationDataReader):  # type: ignore[misc]
    """One batch of images for onnxruntime's calibrators."""

    def __init__(self, images_NHWC: np.ndarray) -> None:
        self.left = [{INPUT: images_NHWC}]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def observe_ranges(
    source: Path, batches: Iterable[np.ndarray], method: str, percentile: float
) -> TensorsData:
    """The range of each activation on images: all that was seen, or without the outliers."""
    options = {"percentile": percentile} if method == "percentile" else {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):  # it prints
        calibrator = create_calibrator(
            source, QUANTIZED, f"{scratch}/augmented.onnx", _METHODS[method], extra_options=options
        )
        for images_NHWC in batches:
            calibrator.collect_data(_Batch(images_NHWC))
        return calibrator.compute_data()


def insert_ranges(source: Path, ranges: TensorsData, **options: Any) -> onnx.ModelProto:
    """The QDQ form of an exported file. options: of onnxruntime's `quantize_static`."""
    model = onnx.load(source)
    add_pre_process_metadata(model)  # export has folded BatchNorm and inferred the shapes
    with tempfile.TemporaryDirectory() as scratch:
        cache, target = Path(scratch) / "ranges.json", Path(scratch) / "int8.onnx"
        save_tensors_data(ranges, cache)
        settings = {
            "op_types_to_quantize": QUANTIZED,
            "per_channel": True,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
            "calibrate_method": ranges.calibration_method,
        }
        quantize_static(model, target, calibration_cache_path=cache, **(settings | options))
        quantized = onnx.load(target)
    del quantized.graph.value_info[:]  # some are of tensors that are there no more
    return quantized


def halve(source: Path, target: Path) -> None:
    """Write the float16 form of an exported file: convolutions and what stands between them.

    Input, normalisation, head and outputs stay as they are. Not onnxruntime's own converter
    (onnxruntime.transformers.float16, 1.31): it rounds the logits and the head to float16, too, and leaves
    nodes before those that they need, which onnx's checker refuses.
    """
    model = onnx.load(source)
    graph = model.graph
    inside = [node for node in graph.node if node.op_type in HALVED]
    made = {name for node in inside for name in node.output}
    parameters = {name for node in inside for name in node.input}
    for tensor in graph.initializer:
        if tensor.name in parameters and tensor.data_type == onnx.TensorProto.FLOAT:
            with np.errstate(over="ignore"):  # the proof finds an infinity, and says in which layer
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
                )
    constants = {tensor.name for tensor in graph.initializer}
    nodes, cast = [], set()
    for node in graph.node:
        is_inside = node.op_type in HALVED
        for at, name in enumerate(node.input):
            if name in constants or (name in made) == is_inside:
                continue
            kind = onnx.TensorProto.FLOAT16 if is_inside else onnx.TensorProto.FLOAT
            node.input[at] = f"{name}_cast"
            if name not in cast:
                nodes.append(
                    onnx.helper.make_node("Cast", [name], [f"{name}_cast"], f"node_{name}_cast", to=kind)
                )
                cast.add(name)
        nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    save_model(model, target, variant_of(source, FLOAT16))

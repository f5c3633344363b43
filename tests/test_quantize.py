"""The int8 and float16 files."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import scipy.stats
from conftest import ROOT, export_to, make_weights, random_images
from dvc.utils.collections import nested_contains
from onnx import numpy_helper
from quantized_runs import QUANTIZE, make_quantized_run, of_dataset
from test_evaluate import CONFIG, HISTORY, NUM_BINS

from sdpipe.data.store import DataSet
from sdpipe.deploy import quantize
from sdpipe.deploy.held_out import open_held_out
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.deploy.proof.integers import check_numbers, signal_to_noise_db
from sdpipe.deploy.proof.layers import file_layers, reference_layers, relative_difference
from sdpipe.deploy.proof.parity import Reference
from sdpipe.deploy.quantize import insert_ranges, observe_ranges
from sdpipe.runtime.artifact import open_artifact


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    return make_quantized_run(tmp_path_factory.mktemp("models") / "run", dataset)


def test_int8_operators_are_those_of_the_float_file_with_ranges(run: Path) -> None:
    """Depth 20: 19 convolutions with weight and bias dequantised, ReLUs done by ranges, the rest as it was.

    Ranges: the normalised image, 19 convolutions of which 9 stand behind a ReLU, 9 sums, 2 pooled skips.
    """
    counts = open_artifact(run / "model.int8.onnx", "cpu").operators
    num_ranges = 1 + 19 + 9 + 2
    assert counts == {
        "Add": 9, "AveragePool": 2, "Cast": 1, "Conv": 19, "DequantizeLinear": 2 * 19 + num_ranges, "Div": 2,
        "Gemm": 1, "Pad": 2, "QuantizeLinear": num_ranges, "ReduceMean": 1, "Softmax": 1, "Sub": 1,
        "Transpose": 1,
    }  # fmt: skip


def test_float16_has_two_casts_more_and_half_the_bytes(run: Path) -> None:
    names = ("model.fp16.onnx", "model.onnx")
    ours, theirs = (open_artifact(run / name, "cpu").operators for name in names)
    assert ours == theirs | {"Cast": theirs["Cast"] + 2}
    numbers = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(run / "model.onnx").graph.initializer
    }
    for tensor in onnx.load(run / "model.fp16.onnx").graph.initializer:
        values, exact = numpy_helper.to_array(tensor), numbers[tensor.name]
        np.testing.assert_array_equal(values, exact.astype(np.float16) if "conv" in tensor.name else exact)


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("model.int8.onnx", "int8"),
        ("model.fp16.onnx", "fp16"),
        ("pruned-int8/keep-7.int8.onnx", "keep-7.int8"),
    ],
)
def test_the_files_stand_alone_and_describe_themselves(run: Path, file: str, variant: str) -> None:
    """One file, the contract's inputs and outputs (open_artifact checks), no trace of the machine."""
    artifact = open_artifact(run / file, "cpu")
    source = open_artifact(run / ("pruned/keep-7.onnx" if "keep" in file else "model.onnx"), "cpu")
    assert artifact.metadata == replace(source.metadata, variant=variant)
    raw = (run / file).read_bytes()
    for trace in (str(ROOT), str(run), "site-packages", ".py", "/tmp"):  # noqa: S108
        assert trace.encode() not in raw, trace
    model = onnx.load(run / file, load_external_data=False)
    assert not [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {path.name for path in run.iterdir()} >= {"model.int8.onnx", "quantize.json"}
    assert not list(run.rglob("*.tmp"))


def test_the_method_is_the_closest_to_float_on_the_validation_part(run: Path, dataset: DataSet) -> None:
    """By the divergence of the probabilities, worked out here by scipy; every figure is in quantize.json."""
    _, validated = open_held_out(of_dataset(make_weights(), dataset).info, dataset)
    images_NHWC = validated[: len(validated)]
    facts = json.loads((run / "quantize.json").read_text())
    assert (facts["num_calibration"], facts["num_validation"]) == (64, 24)  # 0.2 of 120
    for name, floats, ints in (
        ("int8", "model.onnx", "model.int8.onnx"),
        ("keep-7.int8", "pruned/keep-7.onnx", "pruned-int8/keep-7.int8.onnx"),
    ):
        figures = facts[name]["validation"]
        assert list(figures) == ["float", *QUANTIZE.methods]
        divergences = [figures[method]["divergence_from_float"] for method in QUANTIZE.methods]
        assert facts[name]["method"] == QUANTIZE.methods[np.argmin(divergences)]
        exact_NK, int8_NK = (open_artifact(run / file, "cpu").run(images_NHWC)[1] for file in (floats, ints))
        expected = scipy.stats.entropy(exact_NK, int8_NK, axis=1).mean()
        assert min(divergences) == pytest.approx(expected, rel=1e-3)
        wrong = (exact_NK.argmax(axis=1) != validated.labels_N).mean()
        assert figures["float"]["validation_error"] == wrong
    assert not nested_contains(facts, "error"), "which DVC would take for a file that cannot be read"


def test_ranges_are_of_training_images_only(
    run: Path, tmp_path: Path, dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min-max of 8 of them, in batches of 3: the stem, after ReLU, has 255 steps from 0 to its largest value,
    by PyTorch. In validation images, test images and the draw of another seed that is another."""
    for name in ("weights.safetensors", "model.onnx"):
        shutil.copy(run / name, tmp_path)
    monkeypatch.setattr(quantize, "BATCH", 3)
    changes = {"methods": ("minmax",), "images": 8, "seed": 4}
    quantize.quantize_run(tmp_path, dataset, QUANTIZE.model_copy(update=changes))
    tensors = onnx.load(tmp_path / "model.int8.onnx").graph.initializer
    numbers = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    trained, validated = open_held_out(of_dataset(make_weights(), dataset).info, dataset)

    def largest(images_NHWC: np.ndarray) -> float:
        layers = reference_layers(Reference(make_weights()), images_NHWC)
        return next(float(layer.values.max()) for layer in layers if layer.name == "stem")

    found = 255 * float(numbers["relu_scale"])
    assert numbers["relu_zero_point"] == 0
    assert found == pytest.approx(largest(trained.sample(8, 4)[:]), rel=1e-5)
    for others in (validated, validated.sample(8, 4), trained.sample(8, 0), dataset.test_images_NHWC):
        assert abs(largest(others[:]) / found - 1) > 0.01


def test_all_variants_are_proved_and_stand_side_by_side(run: Path, dataset: DataSet) -> None:
    evaluate_run(run, dataset, HISTORY, CONFIG, NUM_BINS)
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["variants"]) == ["fp16", "int8", "keep-7", "keep-7.int8", "ensemble"]
    images, labels = dataset.test_images_NHWC, dataset.test_labels_N
    fp32_N = open_artifact(run / "model.onnx", "cpu").run(images)[0].argmax(axis=1)
    assert metrics["variants"].pop("ensemble")["parity"] is True
    for figures in metrics["variants"].values():
        path = run / figures["file"]
        its_N = open_artifact(path, "cpu").run(images)[0].argmax(axis=1)
        assert figures["parity"] is True
        assert figures["bytes"] == path.stat().st_size
        assert figures["test_error"] == np.mean(its_N != labels)
        assert figures["error_increase"] == figures["test_error"] - metrics["test_error"]
        assert figures["disagreements_with_fp32"] == np.sum(its_N != fp32_N)
    assert metrics["variants"]["int8"]["lowest_sqnr_db"] > CONFIG.int8.min_sqnr_db
    table = list(csv.DictReader((run / "variants.csv").read_text().splitlines()))
    assert [row["variant"] for row in table] == ["fp32", *metrics["variants"], "ensemble"]
    assert {row["fingerprint"] for row in table} == {metrics["fingerprint"]}
    latency = json.loads((run / "latency.json").read_text())["batch_1"]
    assert set(latency) == {"pytorch_eager", "onnxruntime", *metrics["variants"]}
    assert {float(row["batch_1_ms"]) for row in table[:-1]} < {
        times["median_ms"] for times in latency.values()
    }


@pytest.mark.slow
@pytest.mark.parametrize("removed", [(), (5, 7)])  # 7: a transitional block
def test_layers_of_file_and_reference_are_the_same(tmp_path: Path, removed: tuple[int, ...]) -> None:
    """By name, in order, and to rounding; a removed block has none."""
    weights = make_weights(removed=removed)
    path = export_to(tmp_path / "model.onnx", weights)
    images = random_images(4)
    ours, theirs = reference_layers(Reference(weights), images), file_layers(onnx.load(path), images)
    assert [layer.name for layer in ours] == [layer.name for layer in theirs]
    # normalisation, stem, head; 2 pooled skips; 2 convolutions and a sum for each block
    assert len(ours) == 3 + 2 + 3 * (9 - len(removed))
    assert max(relative_difference(a.values, b.values) for a, b in zip(ours, theirs, strict=True)) < 1e-5


@pytest.mark.slow
def test_equal_branches_are_sound_in_int8(tmp_path: Path) -> None:
    """PyTorch's exporter keeps their equal biases once; as integers they differ, as their inputs do."""
    weights = make_weights()
    first, second = "blocks.1.branch.", "blocks.2.branch."
    for name in [name for name in weights.state if name.startswith(first)]:
        weights.state[name.replace(first, second)] = weights.state[name].clone()
    path = export_to(tmp_path / "model.onnx", weights)
    model = onnx.load(path)
    biases = [node.input[2] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(set(biases)) == len(biases) == 20
    images_NHWC = random_images(16)
    logits_NK, _ = open_artifact(path, "cpu").run(images_NHWC)
    np.testing.assert_allclose(logits_NK, Reference(weights).logits(images_NHWC), rtol=1e-4, atol=1e-4)
    ranges = observe_ranges(path, [images_NHWC], "minmax", 99.0)
    assert check_numbers(model, insert_ranges(path, ranges)) == []


@pytest.mark.slow
def test_weights_below_what_float32_divides_are_sound_in_int8(tmp_path: Path) -> None:
    """A convolution of which nothing but its bias is left, as if it were 0."""
    weights = make_weights()
    weights.state["blocks.1.branch.conv1.weight"] *= 1e-40
    path, images_NHWC = export_to(tmp_path / "model.onnx", weights), random_images(16)
    (tensor,) = [each for each in onnx.load(path).graph.initializer if "blocks.1.branch.conv1.w" in each.name]
    assert 0 < np.abs(numpy_helper.to_array(tensor)).max() < 1e-37
    made = insert_ranges(path, observe_ranges(path, [images_NHWC], "minmax", 99.0))
    assert check_numbers(onnx.load(path), made) == []


def test_signal_to_noise_by_hand() -> None:
    """Energy 3^2 + 4^2 = 25 over 0.5^2 = 0.25 is 100, 20 dB."""
    assert signal_to_noise_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20)


@pytest.mark.slow
@pytest.mark.long  # test_pipeline.py compares all that it makes
def test_the_same_files_give_the_same_bytes(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    """Also in a process that orders its sets otherwise."""
    np.save(tmp_path / "images.npy", dataset.test_images_NHWC)
    code = (
        "import sys, numpy, pathlib, hashlib\n"
        "from sdpipe.deploy.quantize import insert_ranges, observe_ranges\n"
        "model, images = pathlib.Path(sys.argv[1]), numpy.load(sys.argv[2])\n"
        "for method in ('minmax', 'entropy', 'percentile'):\n"
        "    made = insert_ranges(model, observe_ranges(model, [images], method, 99.0))\n"
        "    print(hashlib.sha256(made.SerializeToString(deterministic=True)).hexdigest())\n"
    )
    command = [sys.executable, "-c", code, str(run / "model.onnx"), str(tmp_path / "images.npy")]
    printed = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            check=True, capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1

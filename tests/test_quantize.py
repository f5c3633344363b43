"""The int8 and float16 files, and the faults in fold, export and quantisation that are caught."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import scipy.stats
from conftest import ROOT, export_to, make_weights, random_images
from onnx import numpy_helper
from test_evaluate import CONFIG, HISTORY, NUM_BINS, TEMPERATURE

from sdpipe.data.store import DataSet
from sdpipe.deploy.config import ExportConfig, QuantizeConfig
from sdpipe.deploy.export import export_ensemble, export_network
from sdpipe.deploy.fold import fold_weights
from sdpipe.deploy.held_out import open_held_out
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.deploy.proof.integers import measure_layers, prove_integers, signal_to_noise_db
from sdpipe.deploy.proof.layers import file_layers, reference_layers, relative_difference, spread_over
from sdpipe.deploy.proof.parity import Reference
from sdpipe.deploy.proof.variants import Proof, Variant, find_variants, prove
from sdpipe.deploy.quantize import halve, insert_ranges, observe_ranges, quantize_run
from sdpipe.files import write_json
from sdpipe.runtime.artifact import count_operators, open_artifact
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    """models/<run>/ as train, calibrate, export, prune and quantize leave it."""
    folder = tmp_path_factory.mktemp("models") / "run"
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
    quantize_run(folder, dataset, QUANTIZE)
    return folder


def test_int8_operators_are_those_of_the_float_file_with_ranges(run: Path) -> None:
    """Depth 20: 19 convolutions with weight and bias dequantised, ReLUs done by ranges, the rest as it was.

    Ranges: the normalised image, 19 convolutions of which 9 stand behind a ReLU, 9 sums, 2 pooled skips.
    """
    counts = count_operators(run / "model.int8.onnx")
    num_ranges = 1 + 19 + 9 + 2
    assert counts == {
        "Add": 9, "AveragePool": 2, "Cast": 1, "Conv": 19, "DequantizeLinear": 2 * 19 + num_ranges, "Div": 2,
        "Gemm": 1, "Pad": 2, "QuantizeLinear": num_ranges, "ReduceMean": 1, "Softmax": 1, "Sub": 1,
        "Transpose": 1,
    }  # fmt: skip


def test_float16_has_two_casts_more_and_half_the_bytes(run: Path) -> None:
    ours, theirs = count_operators(run / "model.fp16.onnx"), count_operators(run / "model.onnx")
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


def test_ranges_are_of_training_images_only(run: Path, dataset: DataSet) -> None:
    """min-max of the training images' activations, by PyTorch: the stem, after ReLU, starts at 0."""
    trained, _ = open_held_out(of_dataset(make_weights(), dataset).info, dataset)
    sample = trained.sample(64, 0)
    ranges = observe_ranges(run / "model.onnx", sample.batches(7), "minmax", 99.0)
    reference = reference_layers(Reference(make_weights()), sample[:64])
    stem = next(layer.values for layer in reference if layer.name == "stem")
    low, high = (float(np.ravel(value)[0]) for value in ranges["relu"].range_value)
    assert (low, high) == (0.0, pytest.approx(float(stem.max()), rel=1e-5))


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


def test_signal_to_noise_by_hand() -> None:
    """Energy 3^2 + 4^2 = 25 over 0.5^2 = 0.25 is 100, 20 dB."""
    assert signal_to_noise_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20)


# Faults. Each changes a sound file; what must be said of it stands beside it.


def numbers(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    return found


def change(name: str, to: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def plant(model: onnx.ModelProto) -> None:
        tensor = numbers(model, name)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(to(values.copy()).astype(values.dtype), tensor.name))

    return plant


def swap_blocks(model: onnx.ModelProto) -> None:
    one, other = (numbers(model, f"blocks.{block}.branch.conv1.weight") for block in (1, 2))
    one.raw_data, other.raw_data = other.raw_data, one.raw_data


def count_padding(model: onnx.ModelProto) -> None:
    """The window that the border cuts is divided by 4 all the same."""
    for node in model.graph.node:
        if node.op_type == "AveragePool":
            del node.attribute[:]
            for name, value in (("kernel_shape", [2, 2]), ("strides", [2, 2]), ("pads", [0, 0, 1, 1])):
                node.attribute.append(onnx.helper.make_attribute(name, value))
            node.attribute.append(onnx.helper.make_attribute("count_include_pad", 1))


def temperature(change_it: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def plant(model: onnx.ModelProto) -> None:
        (maker,) = [node for node in model.graph.node if node.op_type == "Softmax"]
        (divide,) = [node for node in model.graph.node if node.output[0] == maker.input[0]]
        change(divide.input[1], change_it)(model)

    return plant


EXPORT_FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "two blocks' weights swapped": (swap_blocks, "first departs at block 2, conv 1"),
    "mean image of flipped columns": (change("mean_CHW", lambda m: m[..., ::-1]), "departs at normalisation"),
    "deviation forgotten": (change("std", lambda s: s * 0 + 1), "first departs at normalisation"),
    "pooling counts padding": (count_padding, "first departs at skip 1"),
    "temperature twice": (temperature(lambda t: t * t), r"off softmax\(logits / T\); no layer departs"),
    "temperature not at all": (
        temperature(lambda t: t * 0 + 1),
        r"off softmax\(logits / T\); no layer departs",
    ),
    "one bias of 1e-4 more": (change("blocks.5.branch.conv2.bias", lambda b: b + 1e-4), "block 6, conv 2"),
    "head's classes turned": (change("head.bias", lambda b: np.roll(b, 1)), "first departs at head"),
}


def proof_of(path: Path, weights: Weights, dataset: DataSet, variant: str = "fp32") -> Proof:
    found = Variant(name=variant, path=path, kind="float32", source=path)
    return prove(found, weights, {}, dataset.test_images_NHWC, QUICK)


@pytest.mark.parametrize("fault", EXPORT_FAULTS)
def test_faults_of_export_are_caught_and_located(
    run: Path, tmp_path: Path, dataset: DataSet, fault: str
) -> None:
    plant, said = EXPORT_FAULTS[fault]
    model = onnx.load(run / "model.onnx")
    plant(model)
    onnx.save(model, tmp_path / "model.onnx")
    faults = proof_of(tmp_path / "model.onnx", of_dataset(make_weights(), dataset), dataset).faults
    assert re.search(said, "; ".join(faults)), faults


def test_a_removed_block_that_is_kept_and_a_kept_one_that_is_removed(run: Path, dataset: DataSet) -> None:
    """Each file against the other's weights."""
    whole = of_dataset(make_weights(), dataset)
    pruned = of_dataset(make_weights(removed=REMOVED), dataset)
    kept = proof_of(run / "model.onnx", pruned, dataset)
    assert kept.faults[-1] == "the file has block 4, conv 1 where the reference has block 5, conv 1"
    lost = proof_of(run / "pruned" / "keep-7.onnx", whole, dataset, "keep-7")
    assert lost.faults[-1] == "the file has block 5, conv 1 where the reference has block 4, conv 1"


def drop_bias(model: onnx.ModelProto) -> None:
    (conv,) = [
        node
        for node in model.graph.node
        if "blocks.3.branch.conv1" in "".join(node.input)[:200] and node.op_type == "Conv"
    ]
    del conv.input[2]


def other_zero_point(model: onnx.ModelProto) -> None:
    """The sum of block 2 is read with a zero point of its own."""
    (read,) = [node for node in model.graph.node if node.output[0] == "relu_4_DequantizeLinear_Output"]
    model.graph.initializer.append(numpy_helper.from_array(np.array(3, dtype=np.uint8), "shifted"))
    read.input[2] = "shifted"


def first(values: np.ndarray, step: float) -> np.ndarray:
    values.reshape(-1)[0] += step if values.reshape(-1)[0] < 100 else -step
    return values


CONV = "blocks.3.branch.conv2"
INT8_FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "one channel's scale": (
        change(f"{CONV}.weight_scale", lambda s: np.append(s[:1] * 1.05, s[1:])),
        "block 4, conv 2: channel 0 has the scale",
    ),
    "one weight a step off": (
        change(f"{CONV}.weight_quantized", lambda w: first(w, 1)),
        "block 4, conv 2: channel 0 has a weight",
    ),
    "one bias 2 steps off": (
        change(f"{CONV}.bias_quantized", lambda b: first(b, 2)),
        "block 4, conv 2: the bias of channel 0",
    ),
    "a bias left out": (drop_bias, "node_conv2d_7 computes"),
    "wrong zero point": (
        change("conv2d_8_zero_point", lambda z: z * 0),
        "block 4, conv 2: its range clips",
    ),
    "another zero point to read": (other_zero_point, "relu_4 is read with another scale or zero point"),
    "a range 20 times too wide": (
        change("relu_7_scale", lambda s: s * 20),
        "block 4, conv 2: its bias has not the scale",
    ),
    "the head's weights": (change("head.weight", lambda w: w * 1.001), "head.weight differs"),
}


@pytest.mark.parametrize("fault", INT8_FAULTS)
def test_faults_of_quantisation_are_caught_and_located(
    run: Path, tmp_path: Path, dataset: DataSet, fault: str
) -> None:
    plant, said = INT8_FAULTS[fault]
    model = onnx.load(run / "model.int8.onnx")
    plant(model)
    assert said in said_of(model, run, tmp_path, dataset)


def said_of(model: onnx.ModelProto, run: Path, folder: Path, dataset: DataSet) -> str:
    onnx.save(model, folder / "faulty.onnx")
    shown = spread_over(dataset.test_images_NHWC, 16)
    return "; ".join(prove_integers(run / "model.onnx", folder / "faulty.onnx", shown, CONFIG.int8)[0])


def test_a_sound_int8_file_holds(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    assert said_of(onnx.load(run / "model.int8.onnx"), run, tmp_path, dataset) == ""


def test_one_scale_for_all_channels_is_caught(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    ranges = observe_ranges(run / "model.onnx", [dataset.test_images_NHWC], "minmax", 99.0)
    said = said_of(insert_ranges(run / "model.onnx", ranges, per_channel=False), run, tmp_path, dataset)
    assert "stem: its weights have 1 scales for 4 channels" in said


def test_ranges_of_other_images_are_caught(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    """Black images: what real ones reach is clipped, from the first tensor on."""
    black = np.zeros_like(dataset.test_images_NHWC)
    model = insert_ranges(run / "model.onnx", observe_ranges(run / "model.onnx", [black], "minmax", 99.0))
    assert "normalisation: its range clips" in said_of(model, run, tmp_path, dataset)


def test_an_int8_file_of_another_training_is_caught(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    other = export_to(tmp_path / "other.onnx", make_weights(seed=5), TEMPERATURE)
    ranges = observe_ranges(other, [dataset.test_images_NHWC], "minmax", 99.0)
    assert "stem: channel 0 has the scale" in said_of(insert_ranges(other, ranges), run, tmp_path, dataset)


def test_a_float16_overflow_is_caught_and_located(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    """Values of 1e5 and more in block 2: a CPU computes them in float32, a GPU would make them infinite."""
    model = onnx.load(run / "model.onnx")
    change("blocks.1.branch.conv2.weight", lambda w: w * 1e5)(model)
    onnx.save(model, tmp_path / "model.onnx")
    halve(tmp_path / "model.onnx", tmp_path / "model.fp16.onnx")
    weights = of_dataset(make_weights(), dataset)
    proofs = {}
    for variant in find_variants(tmp_path):
        proofs[variant.path] = prove(variant, weights, proofs, dataset.test_images_NHWC, QUICK)
    said = "; ".join(proofs[tmp_path / "model.fp16.onnx"].faults)
    assert "block 2, conv 2: values up to" in said
    assert "block 2, conv 1: values" not in said


def test_a_faulty_int8_file_is_named_and_marked(
    run: Path, tmp_path: Path, dataset: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next to a sound float32 file: the stage goes on, says what is wrong, and metrics.json keeps it back."""
    for name in ("weights.safetensors", "calibration.json", "model.onnx", "ensemble.onnx", "model.int8.onnx"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    model = onnx.load(tmp_path / "model.int8.onnx")
    change(f"{CONV}.weight_scale", lambda s: s * 1.05)(model)
    onnx.save(model, tmp_path / "model.int8.onnx")
    evaluate_run(tmp_path, dataset, HISTORY, QUICK, NUM_BINS)
    said = capsys.readouterr().out
    assert "model.int8.onnx: not to be deployed, parity fails: block 4, conv 2: channel 0" in said
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["parity"], metrics["variants"]["int8"]["parity"]) == (True, False)


def test_noise_grows_where_a_range_is_wrong(run: Path, dataset: DataSet) -> None:
    """The range of one layer 4 times as wide adds noise there, and none to earlier layers."""
    shown = spread_over(dataset.test_images_NHWC, 16)
    sound, wide = onnx.load(run / "model.int8.onnx"), onnx.load(run / "model.int8.onnx")
    change("relu_7_scale", lambda s: s * 4)(wide)
    before, after = (measure_layers(onnx.load(run / "model.onnx"), model, shown) for model in (sound, wide))
    at = next(number for number, layer in enumerate(before) if layer.name == "block 4, conv 1")
    assert [layer.sqnr_db for layer in before[:at]] == [layer.sqnr_db for layer in after[:at]]
    assert after[at].sqnr_db < before[at].sqnr_db - 1


@pytest.mark.slow
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

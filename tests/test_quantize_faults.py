"""Faults in fold, export and quantisation, each planted in a sound file, and what must be said of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import export_to, make_weights
from onnx import numpy_helper
from quantized_runs import QUICK, REMOVED, make_quantized_run, of_dataset
from test_evaluate import CONFIG, HISTORY, NUM_BINS, TEMPERATURE

from sdpipe.data.store import DataSet
from sdpipe.deploy.files_of_run import Variant, files_of_run
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.deploy.proof.integers import measure_layers, prove_integers
from sdpipe.deploy.proof.layers import spread_over
from sdpipe.deploy.proof.variants import Proof, prove
from sdpipe.deploy.quantize import halve, insert_ranges, observe_ranges
from sdpipe.training.weights import Weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    return make_quantized_run(tmp_path_factory.mktemp("models") / "run", dataset)


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


def proof_of(run: Path, path: Path, weights: Weights, dataset: DataSet, variant: str = "fp32") -> Proof:
    place = run / "weights.safetensors"
    found = Variant(name=variant, path=path, kind="float32", source=place, weights=place)
    return prove(found, weights, {}, dataset.test_images_NHWC, QUICK)


@pytest.mark.parametrize("fault", EXPORT_FAULTS)
def test_faults_of_export_are_caught_and_located(
    run: Path, tmp_path: Path, dataset: DataSet, fault: str
) -> None:
    plant, said = EXPORT_FAULTS[fault]
    model = onnx.load(run / "model.onnx")
    plant(model)
    onnx.save(model, tmp_path / "model.onnx")
    faults = proof_of(run, tmp_path / "model.onnx", of_dataset(make_weights(), dataset), dataset).faults
    assert re.search(said, "; ".join(faults)), faults


def test_a_removed_block_that_is_kept_and_a_kept_one_that_is_removed(run: Path, dataset: DataSet) -> None:
    """Each file against the other's weights."""
    whole = of_dataset(make_weights(), dataset)
    pruned = of_dataset(make_weights(removed=REMOVED), dataset)
    kept = proof_of(run, run / "model.onnx", pruned, dataset)
    assert kept.faults[-1] == "the file has block 4, conv 1 where the reference has block 5, conv 1"
    lost = proof_of(run, run / "pruned" / "keep-7.onnx", whole, dataset, "keep-7")
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
    "a channel's scale of 0": (
        change(f"{CONV}.weight_scale", lambda s: np.append(s[:-1], 0)),
        "block 4, conv 2: has the scale 0 for its input, weights or bias",
    ),
    "an input's scale of 0": (change("relu_7_scale", lambda s: s * 0), "block 4, conv 2: has the scale 0"),
    "a bias's scale of 0": (
        change(f"{CONV}.bias_quantized_scale", lambda s: s * 0),
        "block 4, conv 2: has the scale 0",
    ),
    "a scale that is no number": (
        change(f"{CONV}.weight_scale", lambda s: s * np.nan),
        "block 4, conv 2: has the scale nan",
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


@pytest.mark.slow
def test_an_int8_file_of_another_training_is_caught(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    other = export_to(tmp_path / "other.onnx", make_weights(seed=5), TEMPERATURE)
    ranges = observe_ranges(other, [dataset.test_images_NHWC], "minmax", 99.0)
    assert "stem: channel 0 has the scale" in said_of(insert_ranges(other, ranges), run, tmp_path, dataset)


def test_a_float16_overflow_is_caught_and_located(run: Path, tmp_path: Path, dataset: DataSet) -> None:
    """Values of 1e5 and more in block 2: a CPU computes them in float32, a GPU would make them infinite."""
    model = onnx.load(run / "model.onnx")
    change("blocks.1.branch.conv2.weight", lambda w: w * 1e5)(model)
    onnx.save(model, tmp_path / "model.onnx")
    shutil.copy(run / "calibration.json", tmp_path)
    halve(tmp_path / "model.onnx", tmp_path / "model.fp16.onnx")
    weights = of_dataset(make_weights(), dataset)
    proofs = {}
    for variant in files_of_run(tmp_path):
        proofs[variant.path] = prove(variant, weights, proofs, dataset.test_images_NHWC, QUICK)
    said = "; ".join(proofs[tmp_path / "model.fp16.onnx"].faults)
    assert "block 2, conv 2: values up to" in said
    assert "block 2, conv 1: values" not in said


@pytest.mark.slow
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
    """The range of one layer 16 times as wide adds noise there, and none to earlier layers."""
    shown = spread_over(dataset.test_images_NHWC, 16)
    sound, wide = onnx.load(run / "model.int8.onnx"), onnx.load(run / "model.int8.onnx")
    change("relu_7_scale", lambda s: s * 16)(wide)
    before, after = (measure_layers(onnx.load(run / "model.onnx"), model, shown) for model in (sound, wide))
    at = next(number for number, layer in enumerate(before) if layer.name == "block 4, conv 1")
    assert [layer.sqnr_db for layer in before[:at]] == [layer.sqnr_db for layer in after[:at]]
    assert after[at].sqnr_db < before[at].sqnr_db - 1

"""What a file computes is known before it runs: shapes as onnx infers them, and what would take too much."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import SIZE, export_to, make_weights, random_images
from onnx import TensorProto, helper, numpy_helper
from test_hostile_models import edited, refusal

from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.export import export_ensemble, save_model
from sdpipe.deploy.quantize import halve, insert_ranges, observe_ranges, variant_of
from sdpipe.errors import ModelError
from sdpipe.runtime import onnx_file
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.shapes import _DEFAULTS, BATCH, infer_shapes, most_numbers

LIMIT = most_numbers(SIZE, SIZE)


@pytest.fixture(scope="module")
def ensemble_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ensemble") / "ensemble.onnx"
    export_ensemble(make_weights(), path, ExportConfig(opset=20), temperature=1.0)
    return path


def theirs(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes that onnx infers, with BATCH for its name of the batch."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value or BATCH for dim in value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input, *graph.output]
    }


def compare(path: Path, **inputs: tuple[int, ...]) -> None:
    structure = onnx_file.parse(path.read_bytes(), "x")
    ours, expected = infer_shapes(structure, inputs, LIMIT), theirs(path)
    assert len(ours) > 50
    assert ours == {name: expected[name] for name in ours}


@pytest.mark.slow
def test_shapes_are_those_that_onnx_infers(model_path: Path, ensemble_path: Path, tmp_path: Path) -> None:
    """Of every value in an fp32, an fp16, an int8 and an ensemble's file, and in a bottleneck network."""
    images = (BATCH, SIZE, SIZE, 1)
    compare(model_path, images=images)
    compare(ensemble_path, images=images, switches=(9,))
    halve(model_path, tmp_path / "fp16.onnx")
    compare(tmp_path / "fp16.onnx", images=images)
    ranges = observe_ranges(model_path, [random_images(8)], "minmax", 99.9)
    save_model(insert_ranges(model_path, ranges), tmp_path / "int8.onnx", variant_of(model_path, "int8"))
    compare(tmp_path / "int8.onnx", images=images)
    deep = make_weights(family="imagenet", depth=50, widths=(4, 8, 16, 32), skip="A", channels=3)
    compare(export_to(tmp_path / "50.onnx", deep), images=(BATCH, SIZE, SIZE, 3))


def test_every_operator_has_a_shape() -> None:
    assert _DEFAULTS.keys() == onnx_file.OPERATORS


def first(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def give(node: onnx.NodeProto, name: str, value: object) -> None:
    """Set an attribute."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def add(model: onnx.ModelProto, *nodes: onnx.NodeProto, **tensors: np.ndarray) -> None:
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items())


def split_into(number: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: give(first(model, "Split"), "num_outputs", number)


@pytest.mark.parametrize("number", [1, 5, -1, 2**40])
def test_a_split_into_other_parts_is_refused(tmp_path: Path, ensemble_path: Path, number: int) -> None:
    """onnxruntime would end the process."""
    assert "Split of [(9,)]" in refusal(edited(ensemble_path, tmp_path, split_into(number)))


def pad_along_axes(model: onnx.ModelProto) -> None:
    first(model, "Pad").input.extend(["zero", "axes"])
    add(model, zero=np.zeros((), np.float32), axes=np.array([0, 2, 1, 3]))


def outer_product(model: onnx.ModelProto) -> None:
    """A column and a row of 12,000, each no more than the file holds."""
    picture = first(model, "Sub").output[0]
    window = {"kernel_shape": [SIZE, SIZE], "strides": [1, 1], "pads": [0] * 4}
    add(
        model,
        helper.make_node("MaxPool", [picture], ["one"], **window),
        helper.make_node("Add", ["one", "column"], ["long"]),
        helper.make_node("Add", ["long", "row"], ["square"]),
        column=np.ones((12_000, 1), np.float32),
        row=np.ones((1, 12_000), np.float32),
    )


def fold_at_opening(model: onnx.ModelProto) -> None:
    column, row = np.ones((12_000, 1), np.float32), np.ones((1, 12_000), np.float32)
    add(model, helper.make_node("Add", ["column", "row"], ["square"]), column=column, row=row)


def keep_everything(model: onnx.ModelProto) -> None:
    """Five thousand copies, all of which the last operators still need."""
    copies = [first(model, "Relu").output[0], *(f"copy{at}" for at in range(5000))]
    sums = [copies[-1], *(f"sum{at}" for at in range(5000))]
    add(model, *(helper.make_node("Relu", [one], [other]) for one, other in pairwise(copies)))
    for at, (one, other) in enumerate(pairwise(sums)):
        add(model, helper.make_node("Add", [one, copies[4999 - at]], [other]))


def pack_twice(model: onnx.ModelProto) -> None:
    """onnxruntime makes a packed copy of its weights for each Gemm."""
    logits = first(model, "Gemm").output[0]
    tensors = {"wide": np.ones((2000, 3), np.float32), "no": np.zeros(2000, np.float32)}
    made = [helper.make_node("Gemm", [logits, "wide", "no"], [name], transB=1) for name in ("x", "y")]
    add(model, *made, **tensors)


def mix_images(model: onnx.ModelProto) -> None:
    """(N, 3) and (N, 3, 1, 1) would be (N, 3, N, 3)."""
    picture, logits = first(model, "Conv").output[0], first(model, "Gemm").output[0]
    window = {"kernel_shape": [SIZE, SIZE], "strides": [1, 1], "pads": [0] * 4}
    add(model, helper.make_node("MaxPool", [picture], ["one"], **window))
    add(model, helper.make_node("Add", ["one", logits], ["mixed"]))


def average_over_images(model: onnx.ModelProto) -> None:
    axes = first(model, "ReduceMean").input[1]
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == axes]
    tensor.raw_data = np.array([0, 2]).tobytes()


def empty_weights(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.append(2**40)


def repeat(model: onnx.ModelProto) -> None:
    """onnxruntime would take seconds for these, and hours for more."""
    values = [first(model, "Gemm").output[0], *(f"twice{at}" for at in range(onnx_file.MAX_USES))]
    add(model, *(helper.make_node("Add", [one, one], [other]) for one, other in pairwise(values)))


def scale_each_image(model: onnx.ModelProto) -> None:
    picture = first(model, "Sub").output[0]
    quantise = helper.make_node("QuantizeLinear", [picture, "scales", "zeros"], ["small"], axis=0)
    scales, zeros = np.array([1, 20], np.float32), np.zeros(2, np.uint8)
    add(model, quantise, scales=scales, zeros=zeros)


PLANTED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "padding of a window": (lambda model: give(first(model, "Conv"), "pads", [4096] * 4), "pads [4096"),
    "a pixel of it": (lambda model: give(first(model, "Conv"), "pads", [3, 1, 1, 1]), "pads [3, 1, 1, 1]"),
    "padding by an attribute": (
        lambda model: give(first(model, "Pad"), "pads", [0, 0, 0, 0, 0, 0, 4096, 4096]),
        "Pad with 'pads'",
    ),
    "padding along axes": (pad_along_axes, "Pad of"),
    "padding chosen by onnxruntime": (
        lambda model: give(first(model, "Conv"), "auto_pad", "SAME_UPPER"),
        "'auto_pad' 'SAME_UPPER'",
    ),
    "groups": (lambda model: give(first(model, "Conv"), "group", 0), "'group' 0"),
    "texts": (lambda model: give(first(model, "Cast"), "to", TensorProto.STRING), "Cast with 'to' 8"),
    "an outer product": (outer_product, "12000, 12000) where 663,552 numbers are enough"),
    "one that is folded at opening": (fold_at_opening, "Add of weights alone"),
    "all values at a time": (keep_everything, "where 663,552 numbers are enough"),
    "copies of weights": (pack_twice, "weights that two operators take"),
    "one image with another": (mix_images, "Add that makes"),
    "the mean of all images": (average_over_images, "ReduceMean of"),
    "probabilities of all images": (lambda model: give(first(model, "Softmax"), "axis", 0), "Softmax of"),
    "a scale for each image": (scale_each_image, "QuantizeLinear of images with several scales"),
    "an operator too often": (repeat, "times Add"),
    "a terabyte of weights": (empty_weights, "a tensor of the shape [1099511627776]"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_takes_more_than_a_network_is_refused(tmp_path: Path, model_path: Path, name: str) -> None:
    """In one line, before onnxruntime sees it, each of its own kind."""
    edit, expected = PLANTED[name]
    text = refusal(edited(model_path, tmp_path, edit))
    assert "holds what sdpipe does not export, so it is not run: " in text
    assert expected in text
    assert len(text) < 500


def test_rows_that_are_not_the_images_are_refused(model_path: Path) -> None:
    """Each image's row would be another's: a graph that averages over the batch, and is run unjudged."""
    make, value = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            make("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
            make("ReduceMean", ["x", "axes"], ["logits"], keepdims=0),
            make("Softmax", ["logits"], ["probabilities"]),
        ],
        "rows",
        [value("images", TensorProto.UINT8, ["N", 9, 9, 3])],
        [value(name, TensorProto.FLOAT, ["N", 3]) for name in ("logits", "probabilities")],
        [numpy_helper.from_array(np.array([0, 1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    artifact = replace(open_artifact(model_path, "cpu"), session=session)
    with pytest.raises(ModelError, match=r"logits of the shape \(9, 3\), expected \(2, 3\)"):
        artifact.run(random_images(2, channels=3))


def test_the_largest_pictures_have_room() -> None:
    """ResNet's stem at 1024 x 1024 makes 512 x 512 x 64, and three such values stand at a time."""
    assert 3 * 512 * 512 * 64 < most_numbers(1024, 1024) == 2**27
    assert most_numbers(1, 1) > 3 * 2048

"""Model files that are damaged, foreign or made to do harm: refused in one line, before anything runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT, random_images
from onnx import TensorProto, helper

from sdpipe.errors import ModelError
from sdpipe.runtime import onnx_file
from sdpipe.runtime.artifact import open_artifact


def refusal(path: Path) -> str:
    """Why a file is not opened: one line that names it."""
    with pytest.raises(ModelError) as caught:
        open_artifact(path, "cpu")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text


def edited(model_path: Path, folder: Path, edit: Callable[[onnx.ModelProto], object]) -> Path:
    """A copy of a file that is ours, with something planted."""
    model = onnx.load(model_path)
    edit(model)
    path = folder / "planted.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def outside(tensor: TensorProto, location: str = "secret.bin") -> None:
    """Let a tensor's data stand in another file, as onnx writes it."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def branch(name: str) -> onnx.GraphProto:
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Relu", ["logits"], [name])], name, [], [value])


def constant_from_outside() -> onnx.NodeProto:
    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [0.0])
    outside(tensor)
    return helper.make_node("Cast", ["logits"], ["x"], value=tensor)


def sparse() -> onnx.SparseTensorProto:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    outside(values)
    return helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [1], [0]), [3])


def padding(model: onnx.ModelProto) -> TensorProto:
    """What the first transitional block's Pad adds."""
    (name,) = [node.input[1] for node in model.graph.node if node.op_type == "Pad"][:1]
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return tensor


PLANTED: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "external initializer": (lambda model: outside(model.graph.initializer[0]), "data outside the file"),
    "external by its entries alone": (
        lambda model: model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"),
        "data outside the file",
    ),
    "external by its place alone": (
        lambda model: setattr(model.graph.initializer[0], "data_location", TensorProto.EXTERNAL),
        "data outside the file",
    ),
    "external in an attribute": (
        lambda model: model.graph.node.append(constant_from_outside()),
        "data outside the file",
    ),
    "external in a sparse tensor": (
        lambda model: model.graph.sparse_initializer.append(sparse()),
        "sparse tensors",
    ),
    "a subgraph": (
        lambda model: model.graph.node.append(
            helper.make_node("If", ["c"], ["x"], then_branch=branch("a"), else_branch=branch("b"))
        ),
        "a subgraph",
    ),
    "a function": (
        lambda model: model.functions.append(
            helper.make_function("", "Relu", ["x"], ["y"], [], [helper.make_opsetid("", 20)])
        ),
        "functions",
    ),
    "training information": (lambda model: model.training_info.add(), "training information"),
    "another domain": (
        lambda model: setattr(model.graph.node[0], "domain", "com.microsoft"),
        "operators of 'com.microsoft'",
    ),
    "a domain of a megabyte": (
        lambda model: setattr(model.graph.node[0], "domain", "x" * 2**20),
        "operators of 'xxx",
    ),
    "an unexpected operator": (
        lambda model: model.graph.node.append(helper.make_node("RandomNormal", [], ["x"], shape=[2])),
        "the operator 'RandomNormal'",
    ),
    "a stride of zero": (
        lambda model: next(
            attribute
            for node in model.graph.node
            if node.op_type == "Conv"
            for attribute in node.attribute
            if attribute.name == "strides"
        ).ints.__setitem__(0, 0),
        r"strides \[0, 1\]",
    ),
    "padding that fills the memory": (
        lambda model: setattr(padding(model), "raw_data", np.array([0, 0, 0, 0, 0, 2**40, 0, 0]).tobytes()),
        "padding other than by channels",
    ),
    "padding that is computed": (
        lambda model: next(node for node in model.graph.node if node.op_type == "Pad").input.__setitem__(
            1, model.graph.node[0].output[0]
        ),
        "padding other than by channels",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_sdpipe_does_not_export_is_not_run(tmp_path: Path, model_path: Path, name: str) -> None:
    """External data, subgraphs, functions, foreign operators: judged from the bytes, each named."""
    edit, expected = PLANTED[name]
    with pytest.raises(
        ModelError, match=f"holds what sdpipe does not export, so it is not run: .*{expected}"
    ) as caught:
        open_artifact(edited(model_path, tmp_path, edit), "cpu")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_external_data_is_refused_through_any_link(
    tmp_path: Path, model_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """The data lie beside the file as another name of a secret, which onnxruntime alone would read."""
    (tmp_path / "elsewhere").mkdir()
    secret = tmp_path / "elsewhere" / "secret"
    folder = tmp_path / "models"
    folder.mkdir()
    model = onnx.load(model_path)
    secret.write_bytes(model.graph.initializer[0].raw_data)
    link(secret, folder / "secret.bin")
    path = edited(model_path, folder, lambda model: outside(model.graph.initializer[0]))
    if link is os.link:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])  # it would
    assert "data outside the file" in refusal(path)
    link(path, tmp_path / "elsewhere" / "model.onnx")
    assert "data outside the file" in refusal(tmp_path / "elsewhere" / "model.onnx")


def test_a_later_field_cannot_overrule_what_was_judged(tmp_path: Path, model_path: Path) -> None:
    """Protobuf joins a message that comes twice: a second graph behind the first is judged, too."""
    second = onnx.ModelProto()
    second.graph.node.add(op_type="Loop")
    path = tmp_path / "twice.onnx"
    path.write_bytes(model_path.read_bytes() + second.SerializeToString())
    assert "the operator 'Loop'" in refusal(path)


def test_the_bytes_are_read_as_what_was_judged(tmp_path: Path, model_path: Path) -> None:
    """A file that also has the mark of onnxruntime's own format, ORTM at byte 4, is run as the ONNX it is."""
    path = tmp_path / "both.onnx"
    path.write_bytes(b"\x32\x08..ORTM.." + model_path.read_bytes())  # field 6 is the doc_string
    assert path.read_bytes()[4:8] == b"ORTM"
    images = random_images(2)
    np.testing.assert_array_equal(
        open_artifact(path, "cpu").run(images)[0], open_artifact(model_path, "cpu").run(images)[0]
    )


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("schema_version", "99", "schema 99, this sdpipe reads schema"),
        ("schema_version", '"3"', 'schema "3", this sdpipe'),
        ("schema_version", json.dumps("3\n\x1b[31m" + "x" * 10_000), "schema .*, this sdpipe"),
        ("channels", "2", "expected 1 or 3"),
        ("channels", '"3"', "expected int"),
        ("crop_fraction", "NaN", r"NaN, expected float, finite and under 2\^53"),
        ("temperature", "NaN", r"NaN, expected float, finite and under 2\^53"),
        ("temperature", "1e400", r"Infinity, expected float, finite and under 2\^53"),
        ("p_L", "-Infinity", r"-Infinity, expected float, finite and under 2\^53"),
        ("scales", "[0.5, NaN]", r"expected list\[float\], finite and under 2\^53"),
        ("scales", "[1.0]", "expected 9 numbers, none below 0"),
        ("scales", str([1.0] * 8 + [-1.0]), "expected 9 numbers, none below 0"),
        ("survival_probs", "[0.5]", "expected probabilities over 0, one for each block of 20 layers"),
        ("survival_probs", "[]", "expected probabilities over 0, one for each block of 20 layers"),
        ("survival_probs", str([0.5] * 8 + [0.0]), "expected probabilities over 0"),
        ("depth", "2", "survival_probs is .*, expected .* one for each block of 2 layers"),
        ("temperature", "0", "expected more than 0"),
        ("temperature", "-1", "expected more than 0"),
        ("depth", "1" * 400, "expected int"),
        ("crop_fraction", "0", "expected more than 0"),
        ("image_size", "[9]", "expected a height and a width"),
        ("image_size", "[9, 100000]", "expected a height and a width"),
        ("image_size", "[9, true]", r"expected list\[int\]"),
        ("class_names", "[]", "expected at least one name"),
        ("class_names", '["cat", 3, "eel"]', r"expected list\[str\]"),
        ("class_names", '["cat", "eel", "cat"]', "expected at least one name, each once"),
        ("class_names", r'["cat", "\ud800", "eel"]', r"expected list\[str\], of whole characters"),
        ("data_set", r'"\udfff"', "expected str, of whole characters"),
        ("class_names", "[" * 100_000, "missing or damaged"),
        ("p_L", '"' + "x" * 10_000 + '"', "expected float"),
    ],
)  # fmt: skip
def test_hostile_metadata_are_refused(
    tmp_path: Path, model_path: Path, entry: str, value: str, expected: str
) -> None:
    def edit(model: onnx.ModelProto) -> None:
        for each in model.metadata_props:
            if each.key == f"sdpipe.{entry}":
                each.value = value

    path = edited(model_path, tmp_path, edit)
    with pytest.raises(ModelError, match=expected) as caught:
        open_artifact(path, "cpu")
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_foreign_file_is_said_to_be_foreign(tmp_path: Path, model_path: Path) -> None:
    """That comes first: what else it holds is of no interest."""

    def edit(model: onnx.ModelProto) -> None:
        del model.metadata_props[:]
        model.functions.add()

    assert "not one that sdpipe exported" in refusal(edited(model_path, tmp_path, edit))


def test_files_that_cost_too_much_to_read(tmp_path: Path) -> None:
    """More than protobuf allows is refused unread; a file of nothing but tiny fields within seconds."""
    path = tmp_path / "large.onnx"
    with path.open("wb") as stream:
        stream.truncate(2**31)
    assert "at most 2,147,483,647" in refusal(path)
    path.write_bytes(b"\x08\x01" * 2_000_000)
    assert "over 1,000,000 fields" in refusal(path)
    path.write_bytes(b"\x08" + b"\x80" * 1_000_000)
    assert "over ten bytes" in refusal(path)


def test_operators_are_named_in_one_place(model_path: Path) -> None:
    assert set(open_artifact(model_path, "cpu").operators) <= onnx_file.OPERATORS
    assert not {"If", "Loop", "Scan", "Expand", "Tile", "Resize", "ConstantOfShape"} & onnx_file.OPERATORS


def fuzz(model: Path, first: int, count: int) -> dict[str, float]:
    """Opened and run in another process, so that a crash is seen."""
    command = [sys.executable, str(ROOT / "tests" / "damaged_models.py"), model, str(first), str(count)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30 + count,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_damaged_copies_are_refused_or_run(model_path: Path) -> None:
    """Bits, bytes and stretches: no crash, no hang, no gigabyte. What hit a weight runs."""
    found = fuzz(model_path, 0, 40)
    assert found["refused"] + found["ran"] == 40
    assert found["refused"] >= 5
    assert found["slowest_s"] < 10
    assert found["peak_MiB"] < 1024


@pytest.mark.slow
def test_many_damaged_copies_are_refused_or_run(rgb_model_path: Path) -> None:
    """The same, 800 times; 5,000 were tried once (docs/input.md)."""
    found = fuzz(rgb_model_path, 100, 800)
    assert found["refused"] + found["ran"] == 800
    assert found["peak_MiB"] < 1024

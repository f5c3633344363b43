import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CLASS_NAMES, ROOT, SIZE, export_anew, export_to, make_weights, random_images

from sdpipe.deploy.proof.parity import Reference
from sdpipe.errors import DeviceError, ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import Weights


def test_the_operators_are_those_of_the_test_network(model_path: Path) -> None:
    """Depth 20: 19 convolutions, 9 additions, a ReLU for the stem and two a block, 2 transitional skips.

    No BatchNormalization, no Mul by p_l, no Identity, no If, Loop or random operator.
    """
    counts = open_artifact(model_path, "cpu").operators
    assert counts == {
        "Add": 9, "AveragePool": 2, "Cast": 1, "Conv": 19, "Div": 1, "Gemm": 1, "Pad": 2,
        "ReduceMean": 1, "Relu": 19, "Softmax": 1, "Sub": 1, "Transpose": 1,
    }  # fmt: skip


def test_operators_are_counted_as_onnx_counts_them(model_path: Path) -> None:
    model = onnx.load(model_path)
    names = [node.op_type for node in model.graph.node]
    assert open_artifact(model_path, "cpu").operators == {
        name: names.count(name) for name in sorted(set(names))
    }


def test_it_is_one_file_with_named_inputs_and_outputs(model_path: Path) -> None:
    """uint8 NHWC with a dynamic batch in, float32 logits and probabilities out, no external data."""
    model = onnx.load(model_path, load_external_data=False)
    assert not [
        tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    inputs = [(value.name, value.type, value.shape) for value in session.get_inputs()]
    assert inputs == [("images", "tensor(uint8)", ["batch", SIZE, SIZE, 1])]
    outputs = [(value.name, value.type, value.shape) for value in session.get_outputs()]
    assert outputs == [
        ("logits", "tensor(float)", ["batch", 3]),
        ("probabilities", "tensor(float)", ["batch", 3]),
    ]


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_it_computes_what_the_unfolded_network_computes(
    rgb_weights: Weights, rgb_model_path: Path, batch: int
) -> None:
    """Normalisation included, at any batch size, for RGB and an odd image size."""
    images = random_images(batch, channels=3)
    logits, probabilities = open_artifact(rgb_model_path, "cpu").run(images)
    normalised = (images.astype(np.float64) - rgb_weights.normalisation.mean_HWC.numpy()) / 60.0
    with torch.no_grad():
        network = rgb_weights.build_network().double()
        reference = network(torch.from_numpy(normalised).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits, reference, atol=2e-6 * (reference.max() - reference.min()), rtol=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    exponentials = np.exp(reference)
    np.testing.assert_allclose(
        probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-5
    )


def test_nothing_of_the_exporting_machine_is_in_the_file(model_path: Path) -> None:
    raw = model_path.read_bytes()
    for trace in (str(ROOT), str(Path(torch.__file__).parent), "site-packages", ".py", "/tmp", "File \\"):  # noqa: S108
        assert trace.encode() not in raw, trace
    model = onnx.load(model_path)
    assert not [node.name for node in model.graph.node if node.metadata_props or node.doc_string]


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes(tmp_path: Path, model_path: Path, weights: Weights) -> None:
    assert export_anew(tmp_path / "again.onnx", weights).read_bytes() == model_path.read_bytes()


def test_it_describes_itself(model_path: Path) -> None:
    """Everything that a graph cannot say, as JSON in the metadata."""
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load(model_path).metadata_props}
    assert entries["sdpipe.schema_version"] == 3
    assert entries["sdpipe.class_names"] == list(CLASS_NAMES)
    assert entries["sdpipe.image_size"] == [SIZE, SIZE]
    assert (entries["sdpipe.depth"], entries["sdpipe.rule"], entries["sdpipe.p_L"]) == (
        20,
        "linear_decay",
        0.5,
    )
    # p_l = 1 - l/9 * 0.5
    assert entries["sdpipe.survival_probs"] == pytest.approx([1 - ell / 18 for ell in range(1, 10)])
    assert entries["sdpipe.fingerprint"] == "0123456789abcdef"
    assert {
        "sdpipe.channels",
        "sdpipe.resize",
        "sdpipe.crop",
        "sdpipe.data_set",
        "sdpipe.sdpipe_version",
    } <= set(entries)


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def refuse(*_arguments: object, **_keywords: object) -> None:
        raise onnx.checker.ValidationError("planted")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export_anew(path, make_weights())
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "text", "truncated", "foreign", "schema", "entry", "classes", "size"]
)
def test_files_that_are_not_ours_are_refused(tmp_path: Path, model_path: Path, damage: str) -> None:
    path = tmp_path / "bad.onnx"
    model = onnx.load(model_path)
    if damage in ("empty", "text", "truncated"):
        raw = model_path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": raw[: len(raw) // 2]}[damage])
    elif damage != "missing":
        entries = {entry.key: entry.value for entry in model.metadata_props}
        del model.metadata_props[:]
        if damage == "schema":
            entries["sdpipe.schema_version"] = "99"
        if damage == "entry":
            del entries["sdpipe.class_names"]
        if damage == "classes":
            entries["sdpipe.class_names"] = '["cat", "dog"]'
        if damage == "size":
            entries["sdpipe.image_size"] = "5"
        if damage != "foreign":
            onnx.helper.set_model_props(model, entries)
        onnx.save(model, path)
    with pytest.raises(ModelError, match=r"bad\.onnx") as caught:
        open_artifact(path, "cpu")
    assert "\n" not in str(caught.value)


def test_cuda_is_not_silently_replaced(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no driver reports a device, asking for CUDA is an error and not a CPU session."""
    monkeypatch.setattr("sdpipe.runtime.artifact.num_cuda_devices", lambda: 0)
    with pytest.raises(DeviceError, match="no CUDA device"):
        open_artifact(model_path, "cuda")
    assert open_artifact(model_path, "auto").providers == ["CPUExecutionProvider"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["blocks.2.branch.bn2", "blocks.2.branch.bn1", "stem.bn", "head"])
def test_a_bias_of_zero_is_in_the_file(tmp_path: Path, part: str) -> None:
    """As of a block that was never drawn, or a branch that collapsed; PyTorch's exporter leaves it out."""
    weights = make_weights()
    state = dict(weights.state)
    for name in (f"{part}.bias", f"{part}.running_mean"):
        if name in state:
            state[name] = torch.zeros_like(state[name])
    if part == "blocks.2.branch.bn2":  # and a second one like it: the exporter keeps equal weights once
        for name in [name for name in state if name.startswith(("blocks.1.branch.", "blocks.2.branch."))]:
            state[name] = torch.zeros_like(state[name])
    weights = replace(weights, state=state)
    path = export_to(tmp_path / "model.onnx", weights)
    convolutions = [node for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm")]
    assert {len(node.input) for node in convolutions} == {3}
    images = random_images(5)
    logits_NK, _ = open_artifact(path, "cpu").run(images)
    np.testing.assert_allclose(logits_NK, Reference(weights).logits(images), rtol=1e-4, atol=1e-4)

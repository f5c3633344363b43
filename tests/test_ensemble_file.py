"""The ensemble's file against PyTorch, every sub-network of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import SIZE, make_weights, random_images
from ensemble_files import deploy_ensemble, export_ensemble_to, in_pytorch, switches

from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.runtime.uncertainty import draw_members
from sdpipe.training.weights import Weights

TOLERANCE = 2e-6  # of the logit spread (docs/parity.md)
NETS: dict[str, dict[str, Any]] = {
    "A": {"depth": 14},
    "B": {"depth": 8, "skip": "B", "channels": 3},
    "C": {"depth": 8, "skip": "C"},
    "imagenet": {"family": "imagenet", "depth": 18, "widths": (4, 4, 8, 8), "skip": "B"},
    "bottleneck": {"family": "imagenet", "depth": 50, "widths": (2, 2, 4, 4), "skip": "B"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "net", [pytest.param(net, marks=pytest.mark.slow) if net == "bottleneck" else net for net in NETS]
)
def test_every_sub_network_is_that_of_pytorch(tmp_path: Path, net: str) -> None:
    """None active, all active, and drawn ones, in batches of 1 and 5; b_l = p_l is the test network.

    With none active the branches leave no trace, and each learned skip is ReLU(projection).
    """
    weights = make_weights(**NETS[net])
    artifact = open_artifact(export_ensemble_to(tmp_path / "ensemble.onnx", weights), "cpu")
    config = weights.info.network
    drawn = draw_members(config.survival_probs, 2, seed=1)
    images_NHWC = random_images(5, channels=config.in_channels)
    cases: list[tuple[Sequence[float], Sequence[bool] | None]] = [
        (active, active) for active in ([False] * config.num_blocks, [True] * config.num_blocks, *drawn)
    ]
    cases.append((config.survival_probs, None))
    for given, active in cases:
        expected_NK = in_pytorch(weights, images_NHWC, active)
        allowed = TOLERANCE * (expected_NK.max() - expected_NK.min())
        for batch in (1, 5):
            logits_NK, _ = artifact.run(images_NHWC[:batch], switches(given))
            np.testing.assert_allclose(logits_NK, expected_NK[:batch], atol=allowed, rtol=0)


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    return deploy_ensemble(tmp_path_factory.mktemp("deployed"), weights)


def test_at_the_survival_probabilities_it_is_the_deployed_model(deployed: Path, weights: Weights) -> None:
    """Logits and probabilities, temperature included."""
    images_NHWC = random_images(6)
    expected = open_artifact(deployed, "cpu").run(images_NHWC)
    ensemble = open_artifact(deployed.parent / "variants" / "ensemble.onnx", "cpu")
    found = ensemble.run(images_NHWC, switches(weights.info.network.survival_probs))
    np.testing.assert_allclose(found[0], expected[0], atol=TOLERANCE * np.ptp(expected[0]), rtol=0)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)


def test_the_graph_has_the_switches_as_an_input_and_nothing_drawn_in_it(deployed: Path) -> None:
    """Depth 20: a Mul for each of 9 branches, and otherwise the operators of the test network."""
    path = deployed.parent / "variants" / "ensemble.onnx"
    assert open_artifact(path, "cpu").operators == {
        "Add": 9, "AveragePool": 2, "Cast": 1, "Conv": 19, "Div": 2, "Gemm": 1, "Mul": 9, "Pad": 2,
        "ReduceMean": 1, "Relu": 19, "Softmax": 1, "Split": 1, "Sub": 1, "Transpose": 1,
    }  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(value.name, value.type, value.shape) for value in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", SIZE, SIZE, 1]),
        ("switches", "tensor(float)", [9]),
    ]
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert entries["sdpipe.variant"] == "ensemble"
    assert entries["sdpipe.survival_probs"] == pytest.approx([1 - ell / 18 for ell in range(1, 10)])
    assert entries["sdpipe.scales"] == [1.0] * 9  # what is folded in


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes(tmp_path: Path, deployed: Path, weights: Weights) -> None:
    again = export_ensemble_to(tmp_path / "again.onnx", weights, 1.5)
    assert again.read_bytes() == (deployed.parent / "variants" / "ensemble.onnx").read_bytes()


@pytest.mark.slow
def test_a_plain_net_has_an_ensemble_file_too(tmp_path: Path) -> None:
    """Stage export writes both files for every run; without skips the switches are all 1."""
    weights = make_weights(depth=8, skip="plain", p_L=1.0)
    artifact = open_artifact(export_ensemble_to(tmp_path / "ensemble.onnx", weights), "cpu")
    images_NHWC = random_images(3)
    expected_NK = in_pytorch(weights, images_NHWC, None)
    logits_NK, _ = artifact.run(images_NHWC, switches([1] * 3))
    np.testing.assert_allclose(logits_NK, expected_NK, atol=TOLERANCE * np.ptp(expected_NK), rtol=0)


@pytest.mark.parametrize("damage", ["switches of a model", "no switches", "too many switches", "text"])
def test_the_graph_must_have_what_its_variant_says(tmp_path: Path, deployed: Path, damage: str) -> None:
    """A file that calls itself an ensemble has the input `switches`, one for each p_l; others have not."""
    is_model = damage == "no switches"
    model = onnx.load(deployed if is_model else deployed.parent / "variants" / "ensemble.onnx")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    entries |= {
        "switches of a model": {"sdpipe.variant": '"fp32"'},
        "no switches": {"sdpipe.variant": '"ensemble"'},
        "too many switches": {"sdpipe.survival_probs": "[0.5, 0.5]"},
        "text": {"sdpipe.survival_probs": '"half"'},
    }[damage]
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(
        ModelError, match=r"bad\.onnx: .*(its graph has|entry sdpipe\.survival_probs is|Split of|'switches')"
    ):
        open_artifact(tmp_path / "bad.onnx", "cpu")

"""The sub-network ensemble: its file against PyTorch, its draws, its spread, and how predict prints it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SIZE, export_to, make_weights, random_images
from PIL import Image
from test_cli import HEAVY

from sdpipe.cli import main
from sdpipe.deploy.config import ExportConfig
from sdpipe.deploy.ensemble import ensemble_probabilities
from sdpipe.deploy.export import export_ensemble
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import Artifact, count_operators, open_artifact
from sdpipe.runtime.uncertainty import draw_members, open_ensemble
from sdpipe.training.weights import Weights

TOLERANCE = 2e-6  # of the logit spread (docs/parity.md)
M = 5


def export_ensemble_to(path: Path, weights: Weights, temperature: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    export_ensemble(weights, path, ExportConfig(opset=20), temperature=temperature)
    return path


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    """A model and, in variants/, its ensemble, at temperature 1.5."""
    folder = tmp_path_factory.mktemp("deployed")
    export_ensemble_to(folder / "variants" / "ensemble.onnx", weights, 1.5)
    return export_to(folder / "model.onnx", weights, 1.5)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven grey PNGs, the pixels of random_images(7)."""
    (tmp_path / "pictures").mkdir()
    for at, image in enumerate(random_images(7)):
        Image.fromarray(image[..., 0]).save(tmp_path / "pictures" / f"{at}.png")
    return tmp_path / "pictures"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def in_pytorch(weights: Weights, images_NHWC: np.ndarray, active: Sequence[bool] | None) -> np.ndarray:
    """Logits of the trained network, BatchNorm and p_l in their places, float64; None: the test network."""
    normalise = weights.normalisation
    images = (torch.from_numpy(images_NHWC).double() - normalise.mean_HWC.double()) / normalise.std.double()
    with torch.inference_mode():
        logits_NK: np.ndarray = weights.build_network().double()(images.permute(0, 3, 1, 2), active).numpy()
    return logits_NK


def switches(active: Sequence[float]) -> np.ndarray:
    return np.array(active, dtype=np.float32)


NETS: dict[str, dict[str, Any]] = {
    "A": {"depth": 14},
    "B": {"depth": 8, "skip": "B", "channels": 3},
    "C": {"depth": 8, "skip": "C"},
    "imagenet": {"family": "imagenet", "depth": 18, "widths": (4, 4, 8, 8), "skip": "B"},
    "bottleneck": {"family": "imagenet", "depth": 50, "widths": (2, 2, 4, 4), "skip": "B"},
}


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
    assert count_operators(path) == {
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


def test_the_same_weights_give_the_same_bytes(tmp_path: Path, deployed: Path, weights: Weights) -> None:
    again = export_ensemble_to(tmp_path / "again.onnx", weights, 1.5)
    assert again.read_bytes() == (deployed.parent / "variants" / "ensemble.onnx").read_bytes()


def test_the_mean_is_that_of_the_sub_networks_in_pytorch(tmp_path: Path, weights: Weights) -> None:
    """`sdpipe ensemble` and `predict --uncertainty` draw the same members."""
    export_ensemble_to(tmp_path / "ensemble.onnx", weights)
    ensemble = open_ensemble(open_artifact(export_to(tmp_path / "model.onnx", weights), "cpu"), M, "cpu")
    images_NHWC, labels_N = random_images(6), np.array([0, 1, 2, 0, 1, 2])
    _, averaged = ensemble_probabilities(weights, images_NHWC, [M], seed=0)
    means = [judged.probability_mean for judged in ensemble.judge(images_NHWC, labels_N)]
    np.testing.assert_allclose(means, averaged[M][np.arange(6), labels_N], atol=1e-5)


def test_the_spread_is_that_of_single_runs(deployed: Path, weights: Weights) -> None:
    """Mean, sample standard deviation and agreement by hand, from M sub-networks of PyTorch at T = 1.5."""
    images_NHWC, labels_N = random_images(6), np.array([0, 1, 2, 0, 1, 2])
    members = draw_members(weights.info.network.survival_probs, M, seed=0)
    assert len({tuple(active) for active in members}) > 1
    logits_MNK = np.stack([in_pytorch(weights, images_NHWC, active) for active in members])
    probabilities_MNK = torch.from_numpy(logits_MNK / 1.5).softmax(dim=2).numpy()
    found = open_ensemble(open_artifact(deployed, "cpu"), M, "cpu").judge(images_NHWC, labels_N)
    for image, (judged, label) in enumerate(zip(found, labels_N, strict=True)):
        values = [float(probabilities_MNK[member, image, label]) for member in range(M)]
        mean = sum(values) / M
        assert judged.members == M
        assert judged.probability_mean == pytest.approx(mean, abs=1e-5)
        variance = sum((value - mean) ** 2 for value in values) / (M - 1)
        assert judged.probability_std == pytest.approx(variance**0.5, abs=1e-5)
        named = [int(probabilities_MNK[member, image].argmax()) for member in range(M)]
        assert judged.agreement == named.count(label) / M


@pytest.mark.parametrize("place", ["ensemble.onnx", "variants/ensemble.onnx"])
def test_predict_prints_the_spread(tmp_path: Path, pictures: Path, deployed: Path, place: str) -> None:
    """Label and probability stay the model's; --json gains one key, and loses none, whatever the batch."""
    model = tmp_path / "model.onnx"
    shutil.copy(deployed, model)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    shutil.copy(deployed.parent / "variants" / "ensemble.onnx", tmp_path / place)
    arguments = ["predict", pictures, "--model", model, "--device", "cpu", "--json"]
    plain = call(*arguments)
    lines = [json.loads(line) for line in call(*arguments, "--uncertainty", M).stdout.splitlines()]
    ones = call(*arguments, "--uncertainty", M, "--batch-size", 1).stdout.splitlines()
    assert len(lines) == 7
    for line, one in zip(lines, ones, strict=True):
        first = json.loads(one)["uncertainty"]
        assert line["uncertainty"] == pytest.approx(first, abs=1e-6)
        assert list(first) == ["members", "probability_mean", "probability_std", "agreement"]
    without = [{key: value for key, value in line.items() if key != "uncertainty"} for line in lines]
    assert without == [json.loads(line) for line in plain.stdout.splitlines()]

    texts = call("predict", pictures, "--model", model, "--uncertainty", M, "--top-k", 2).stdout.splitlines()
    line = lines[0]
    spread, agreeing = line["uncertainty"]["probability_std"], round(line["uncertainty"]["agreement"] * M)
    expected = f"{line['label']} {line['probability']:.4f} +- {spread:.4f} ({agreeing} of {M})"
    assert texts[0] == f"{pictures / '0.png'}: {expected}"
    assert len(texts) == 3 * 7


def refused(*arguments: object) -> str:
    result = call("predict", *arguments, "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_ensembles_that_do_not_belong_to_the_model_are_refused(
    tmp_path: Path, pictures: Path, deployed: Path
) -> None:
    """None there, of another training, or no ensemble at all: one line, exit 1."""
    model, beside = tmp_path / "model.onnx", tmp_path / "ensemble.onnx"
    shutil.copy(deployed, model)
    arguments = [pictures, "--model", model, "--uncertainty", M]
    assert f"needs {beside} or {tmp_path / 'variants' / 'ensemble.onnx'}" in refused(*arguments)
    shutil.copy(deployed, beside)
    assert f"{beside}: expected the variant ensemble, got fp32" in refused(*arguments)
    foreign = onnx.load(deployed.parent / "variants" / "ensemble.onnx")
    entries = {entry.key: entry.value for entry in foreign.metadata_props}
    onnx.helper.set_model_props(foreign, entries | {"sdpipe.fingerprint": '"fedcba9876543210"'})
    onnx.save(foreign, beside)
    assert f"{beside}: expected the training 0123456789abcdef of {model}, got fedcba9876543210" in refused(
        *arguments
    )


def test_constant_depth_has_no_spread(tmp_path: Path, pictures: Path) -> None:
    """Its ensemble file is written, with one sub-network, itself; predict says why it is of no use."""
    weights = make_weights(depth=8, p_L=1.0)
    model = export_to(tmp_path / "model.onnx", weights)
    artifact = open_artifact(export_ensemble_to(tmp_path / "ensemble.onnx", weights), "cpu")
    images_NHWC = random_images(3)
    logits_NK, _ = artifact.run(images_NHWC, switches([1] * 3))
    np.testing.assert_allclose(logits_NK, open_artifact(model, "cpu").run(images_NHWC)[0], atol=1e-5)
    line = refused(pictures, "--model", model, "--uncertainty", M)
    assert "constant depth has no sub-networks" in line


def test_a_pruned_file_is_not_judged_by_the_whole_network(tmp_path: Path, pictures: Path) -> None:
    """Beside it in variants/ stands the ensemble of all blocks, of the same training."""
    export_ensemble_to(tmp_path / "ensemble.onnx", make_weights(depth=8))
    model = export_to(tmp_path / "keep-2.onnx", make_weights(depth=8, removed=[2]))
    line = refused(pictures, "--model", model, "--uncertainty", M)
    assert f"{model}: lacks blocks that the sub-networks have" in line


def test_a_plain_net_has_an_ensemble_file_too(tmp_path: Path) -> None:
    """Stage export writes both files for every run; without skips the switches are all 1."""
    weights = make_weights(depth=8, skip="plain", p_L=1.0)
    artifact = open_artifact(export_ensemble_to(tmp_path / "ensemble.onnx", weights), "cpu")
    images_NHWC = random_images(3)
    expected_NK = in_pytorch(weights, images_NHWC, None)
    logits_NK, _ = artifact.run(images_NHWC, switches([1] * 3))
    np.testing.assert_allclose(logits_NK, expected_NK, atol=TOLERANCE * np.ptp(expected_NK), rtol=0)


def test_the_ensemble_is_no_model_to_predict_with(pictures: Path, deployed: Path) -> None:
    path = deployed.parent / "variants" / "ensemble.onnx"
    assert f"{path}: is the sub-network ensemble" in refused(pictures, "--model", path)
    assert f"{path}: is the sub-network ensemble" in refused(pictures, "--model", path, "--uncertainty", M)
    assert call("inspect", path).exit_code == 0


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


@pytest.mark.parametrize("members", ["0", "1", "-3", "two"])
def test_a_spread_needs_two_members(pictures: Path, deployed: Path, members: str) -> None:
    result = call("predict", pictures, "--model", deployed, "--uncertainty", members)
    assert result.exit_code == 2
    assert "--uncertainty" in result.stderr


def test_it_imports_nothing_of_the_training_stack(pictures: Path, deployed: Path) -> None:
    """numpy draws and onnxruntime computes."""
    code = (
        "import sys\n"
        "from sdpipe.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    arguments = ["predict", str(pictures / "0.png"), "--model", str(deployed), "--uncertainty", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    modules = done.stderr.split()
    assert "sdpipe.runtime.uncertainty" in modules
    assert not [name for name in modules if name.split(".")[0] in HEAVY]


def test_memory_holds_one_batch_whatever_m_is(deployed: Path, weights: Weights) -> None:
    """The first 2 members of 2 are the first 2 of 16, run one after the other on the batch as it is."""
    calls: list[tuple[int, tuple[float, ...]]] = []
    artifact = open_artifact(deployed.parent / "variants" / "ensemble.onnx", "cpu")

    class Recording(Artifact):
        def run(self, images_NHWC: np.ndarray, switches_L: np.ndarray | None = None) -> Any:
            assert switches_L is not None
            calls.append((len(images_NHWC), tuple(switches_L)))
            return super().run(images_NHWC, switches_L)

    for num_members in (2, 16):
        ensemble = open_ensemble(open_artifact(deployed, "cpu"), num_members, "cpu")
        recording = Recording(path=artifact.path, metadata=artifact.metadata, session=artifact.session)
        replace(ensemble, artifact=recording).judge(random_images(4), np.zeros(4, dtype=np.int64))
    expected = draw_members(weights.info.network.survival_probs, 16, seed=0)
    assert [size for size, _ in calls] == [4] * 18
    assert [active for _, active in calls] == [tuple(member) for member in (*expected[:2], *expected)]

"""The sub-network ensemble: its draws, its spread, and how predict prints it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import CLASS_NAMES, export_to, make_weights, random_images
from deployable import sha256
from ensemble_files import deploy_ensemble, export_ensemble_to, in_pytorch, switches
from PIL import Image
from test_cli import HEAVY

from sdpipe.cli import main
from sdpipe.deploy.ensemble import ensemble_probabilities
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.runtime.uncertainty import draw_members, open_ensemble
from sdpipe.training.weights import Weights

M = 5


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    return deploy_ensemble(tmp_path_factory.mktemp("deployed"), weights)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven grey PNGs, the pixels of random_images(7)."""
    (tmp_path / "pictures").mkdir()
    for at, image in enumerate(random_images(7)):
        Image.fromarray(image[..., 0]).save(tmp_path / "pictures" / f"{at}.png")
    return tmp_path / "pictures"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_the_mean_is_that_of_the_sub_networks_in_pytorch(tmp_path: Path, weights: Weights) -> None:
    """`sdpipe ensemble` and `predict --uncertainty` draw the same members."""
    export_ensemble_to(tmp_path / "ensemble.onnx", weights)
    ensemble = open_ensemble(open_artifact(export_to(tmp_path / "model.onnx", weights), "cpu"), M, "cpu")
    images_NHWC, labels_N = random_images(6), np.array([0, 1, 2, 0, 1, 2])
    _, averaged = ensemble_probabilities(weights, images_NHWC, [M], seed=0)
    means = [judged.probability_mean for judged in ensemble.judge(images_NHWC, labels_N)]
    np.testing.assert_allclose(means, averaged[M][np.arange(6), labels_N], atol=1e-5)


def of_members(weights: Weights, images_NHWC: np.ndarray) -> np.ndarray:
    """Probabilities (M, N, K) of the drawn sub-networks by PyTorch, at T = 1.5."""
    members = draw_members(weights.info.network.survival_probs, M, seed=0)
    assert len({tuple(active) for active in members}) > 1
    logits_MNK = np.stack([in_pytorch(weights, images_NHWC, active) for active in members])
    return torch.from_numpy(logits_MNK / 1.5).softmax(dim=2).numpy()


def test_the_spread_is_that_of_single_runs(deployed: Path, weights: Weights) -> None:
    """Mean, sample standard deviation and agreement by hand, from M sub-networks of PyTorch at T = 1.5."""
    images_NHWC, labels_N = random_images(6), np.array([0, 1, 2, 0, 1, 2])
    probabilities_MNK = of_members(weights, images_NHWC)
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
def test_predict_prints_the_spread(
    tmp_path: Path, pictures: Path, deployed: Path, weights: Weights, place: str
) -> None:
    """Label and probability stay the model's; --json gains one key, and loses none, whatever the batch.

    The spread is that of the label that is printed.
    """
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
    means_NK = of_members(weights, random_images(7)).mean(axis=0)
    for line, means in zip(lines, means_NK, strict=True):
        mean = means[CLASS_NAMES.index(line["label"])]
        assert line["uncertainty"]["probability_mean"] == pytest.approx(mean, abs=1e-5)
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


def test_the_ensemble_is_verified_as_the_model_is(tmp_path: Path, pictures: Path, deployed: Path) -> None:
    """One byte that changes nothing computed; the model beside it, and the manifest, are as deployed."""
    model, beside = tmp_path / "model.onnx", tmp_path / "ensemble.onnx"
    shutil.copy(deployed, model)
    shutil.copy(deployed.parent / "variants" / "ensemble.onnx", beside)
    listed = [f"{sha256(path)}  {path.name}\n" for path in (model, beside)]
    (tmp_path / "SHA256SUMS").write_text("".join(listed))
    arguments = [pictures / "0.png", "--model", model, "--uncertainty", M]
    assert call("predict", *arguments, "--verify").exit_code == 0
    beside.write_bytes(beside.read_bytes().replace(b"pytorch", b"PYTORCH", 1))
    assert call("predict", *arguments).exit_code == 0
    assert f"{beside}: not the file that was deployed" in refused(*arguments, "--verify")


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_pruned_file_is_not_judged_by_the_whole_network(tmp_path: Path, pictures: Path) -> None:
    """Beside it in variants/ stands the ensemble of all blocks, of the same training."""
    export_ensemble_to(tmp_path / "ensemble.onnx", make_weights(depth=8))
    model = export_to(tmp_path / "keep-2.onnx", make_weights(depth=8, removed=[2]))
    line = refused(pictures, "--model", model, "--uncertainty", M)
    assert f"{model}: lacks blocks that the sub-networks have" in line


def test_the_ensemble_is_no_model_to_predict_with(pictures: Path, deployed: Path) -> None:
    path = deployed.parent / "variants" / "ensemble.onnx"
    assert f"{path}: is the sub-network ensemble" in refused(pictures, "--model", path)
    assert f"{path}: is the sub-network ensemble" in refused(pictures, "--model", path, "--uncertainty", M)
    assert call("inspect", path).exit_code == 0


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
        recording = Recording(**vars(artifact))
        replace(ensemble, artifact=recording).judge(random_images(4), np.zeros(4, dtype=np.int64))
    expected = draw_members(weights.info.network.survival_probs, 16, seed=0)
    assert [size for size, _ in calls] == [4] * 18
    assert [active for _, active in calls] == [tuple(member) for member in (*expected[:2], *expected)]

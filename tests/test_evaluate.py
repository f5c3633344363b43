"""Parity catches planted faults; evaluate measures against independent oracles."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import export_to, make_weights, random_images
from deployable import deploy_config
from torch import nn

from sdpipe.data.store import DataSet
from sdpipe.deploy import fold as fold_module
from sdpipe.deploy.config import EvaluateConfig, ExportConfig, Fp16Parity, Int8Parity
from sdpipe.deploy.export import export_ensemble
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.deploy.proof.parity import COARSEST, Reference, compare_logits, onnx_logits, parity_faults
from sdpipe.deploy.release.release import judge
from sdpipe.errors import GateError, ModelError, ParityError
from sdpipe.files import write_json
from sdpipe.network import ResNet
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import Weights, load_weights, save_weights

TOLERANCE = 2e-6
CONFIG = EvaluateConfig(
    batch_sizes=(1, 7, 256),
    threads=(1, 2),
    max_relative_logit_diff=TOLERANCE,
    max_probability_diff=1e-5,
    fp16=Fp16Parity(max_relative_logit_diff=0.01),
    int8=Int8Parity(max_relative_logit_diff=0.5, max_clipped=0.005, max_range_ratio=16, min_sqnr_db=12),
    layer_images=16,
    latency_batch_sizes=(1,),
    latency_repeats=3,
)
NUM_BINS = 5
TEMPERATURE = 1.25

HISTORY = [
    {"epoch": 1.0, "learning_rate": 0.1, "train_loss": 1.0, "validation_error": 0.5},
    {"epoch": 2.0, "learning_rate": 0.01, "train_loss": 0.5, "validation_error": 0.25},
]


def with_probs(change: Callable[[list[float]], list[float]]) -> Callable[[ResNet], None]:
    def plant(network: ResNet) -> None:
        probs = change([block.survival_prob for block in network.blocks])
        for block, prob in zip(network.blocks, probs, strict=True):
            block.survival_prob = prob

    return plant


def wrong_epsilon(network: ResNet) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-4  # instead of 1e-5


def dropped_bias(network: ResNet) -> None:
    with torch.no_grad():
        # What folding puts into the bias of one convolution is this BatchNorm's shift.
        bn = network.blocks[4].branch.bn1
        bn.bias.copy_(bn.weight * bn.running_mean / torch.sqrt(bn.running_var + bn.eps))


FAULTS: dict[str, Callable[[ResNet], None]] = {
    "p_l folded twice": with_probs(lambda probs: [prob * prob for prob in probs]),
    "p_l not folded at all": with_probs(lambda probs: [1.0 for _ in probs]),
    "p_l shifted by one block": with_probs(lambda probs: [1.0, *probs[:-1]]),
    "BatchNorm epsilon wrong": wrong_epsilon,
    "one bias dropped": dropped_bias,
}


def fold_with(weights: Weights, plant: Callable[[ResNet], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every fold of this test fold a network in which the fault is planted."""
    sound = fold_module.fold

    def faulty(network: ResNet) -> fold_module.TestNetwork:
        plant(network)
        return sound(network)

    monkeypatch.setattr(fold_module, "fold", faulty)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    return make_run(tmp_path_factory.mktemp("exported") / "stochastic", make_weights(), dataset)


@pytest.fixture
def run_folder(tmp_path: Path, exported: Path) -> Path:
    """models/<run>/ as train, fold and export leave it."""
    return shutil.copytree(exported, tmp_path / "models" / "stochastic")


def make_run(folder: Path, weights: Weights, dataset: DataSet) -> Path:
    folder.mkdir(parents=True)
    info = replace(weights.info, best_epoch=2, dataset_digest=dataset.digest)
    weights = replace(weights, info=info)
    save_weights(folder / "weights.safetensors", weights)
    write_json(folder / "calibration.json", {"temperature": TEMPERATURE})
    export_to(folder / "model.onnx", weights, TEMPERATURE)
    export_ensemble(weights, folder / "ensemble.onnx", ExportConfig(opset=20), temperature=TEMPERATURE)
    return folder


def test_a_sound_fold_passes_at_every_batch_size(run_folder: Path, dataset: DataSet) -> None:
    """parity.csv has each comparison, also those of the ensemble: with p_l, and two draws."""
    evaluate_run(run_folder, dataset, HISTORY, CONFIG, NUM_BINS)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["parity"] is True
    rows = list(csv.DictReader((run_folder / "parity.csv").read_text().splitlines()))
    ways = [("1", "1"), ("7", "1"), ("256", "1"), ("256", "2")]
    found = [(row["variant"], row["batch_size"], row["threads"]) for row in rows]
    draws = [(f"ensemble{name}", "256", "1") for name in ("", ".draw-1", ".draw-2")]
    assert found == [("fp32", *way) for way in ways] + draws
    for figures, its_rows in ((metrics, rows[:4]), (metrics["variants"]["ensemble"], rows[4:])):
        assert max(float(row["relative_logit_diff"]) for row in its_rows) == figures["relative_logit_diff"]
    assert 0 < metrics["relative_logit_diff"] < TOLERANCE
    assert metrics["relative_logit_diff"] == metrics["max_abs_logit_diff"] / metrics["logit_spread"]


def coarse_weights() -> Weights:
    """Logits about 200 that differ by 4: steps of float32 are 1.5e-5 there, 3.6e-6 of the spread."""
    weights = make_weights()
    weights.state["head.bias"] += 200
    return weights


@pytest.mark.slow
def test_a_network_is_not_held_to_more_than_its_own_float32_has(tmp_path: Path, dataset: DataSet) -> None:
    """Its sound file passes, over a bound that asks for more."""
    folder = make_run(tmp_path / "sound", make_weights(), dataset)
    bound = 1e-9
    config = CONFIG.model_copy(update={"max_relative_logit_diff": bound})
    evaluate_run(folder, dataset, HISTORY, config, NUM_BINS)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["parity"] is True
    assert bound < metrics["relative_logit_diff"] < TOLERANCE


def test_what_is_allowed_follows_from_float64(dataset: DataSet) -> None:
    images_NHWC = dataset.test_images_NHWC
    wide = 10 * TOLERANCE  # 2e-5; this network rounds by 1e-7 to 3e-7, by the processor's kernels
    assert Reference(make_weights()).allowed(wide, images_NHWC) == (wide, [])
    allowed, faults = Reference(coarse_weights()).allowed(TOLERANCE, images_NHWC)
    assert TOLERANCE < allowed < COARSEST
    assert faults == []
    broken = make_weights()
    broken.state["head.bias"] += float("nan")
    assert Reference(broken).allowed(TOLERANCE, images_NHWC) == (TOLERANCE, [])


@pytest.mark.slow
def test_planted_faults_fail_where_float32_is_coarse_too(
    tmp_path: Path, dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = coarse_weights()
    fold_with(weights, wrong_epsilon, monkeypatch)
    with pytest.raises(ParityError, match="logits differ by"):
        evaluate_run(make_run(tmp_path / "faulty", weights, dataset), dataset, HISTORY, CONFIG, NUM_BINS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        fault
        if fault == "p_l not folded at all"
        else pytest.param(fault, marks=[pytest.mark.slow, pytest.mark.long])
        for fault in FAULTS
    ],
)
def test_planted_faults_fail_evaluate(
    tmp_path: Path, dataset: DataSet, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the five makes evaluate raise, say so in metrics.json, and be refused by deploy."""
    weights = make_weights()
    fold_with(weights, FAULTS[fault], monkeypatch)
    folder = make_run(tmp_path / "models" / "faulty", weights, dataset)
    with pytest.raises(ParityError, match="logits differ by"):
        evaluate_run(folder, dataset, HISTORY, CONFIG, NUM_BINS)
    assert json.loads((folder / "metrics.json").read_text())["parity"] is False
    with pytest.raises(GateError, match="parity"):
        judge(folder, deploy_config(max_test_error=1.0))


@pytest.mark.slow
def test_scores_against_plain_counting(run_folder: Path, dataset: DataSet) -> None:
    """Error, likelihood, precision, recall and confusion from the float64 network, counted by hand."""
    evaluate_run(run_folder, dataset, HISTORY, CONFIG, NUM_BINS)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    weights = make_weights()
    images, labels = dataset.test_images_NHWC, dataset.test_labels_N
    normalised = (images.astype(np.float64) - weights.normalisation.mean_HWC.numpy()) / 60.0
    with torch.no_grad():
        logits = weights.build_network().double()(torch.from_numpy(normalised).permute(0, 3, 1, 2))
    predicted = logits.argmax(dim=1).numpy()
    assert metrics["test_error"] == metrics["test_error_pytorch"] == np.mean(predicted != labels)
    for name, temperature in (("", TEMPERATURE), ("_uncalibrated", 1.0)):
        likelihood = torch.nn.functional.cross_entropy(logits / temperature, torch.from_numpy(labels)).item()
        assert metrics[f"negative_log_likelihood{name}"] == pytest.approx(likelihood, rel=1e-5)
        confidence, named = (logits / temperature).softmax(dim=1).max(dim=1)
        error = 0.0
        for low in np.arange(NUM_BINS) / NUM_BINS:
            inside = (confidence > low) & (confidence <= low + 1 / NUM_BINS)
            right = (named == torch.from_numpy(labels))[inside].double()
            error += abs(float(confidence[inside].sum() - right.sum())) / len(labels)
        assert metrics[f"expected_calibration_error{name}"] == pytest.approx(error, rel=1e-5)
    bins = list(csv.DictReader((run_folder / "reliability.csv").read_text().splitlines()))
    for name, suffix in (("calibrated", ""), ("uncalibrated", "_uncalibrated")):
        found = [each for each in bins if each["probabilities"] == name]
        assert [float(each["highest"]) for each in found] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        numbers = [[float(each[name]) for name in ("num_images", "confidence", "accuracy")] for each in found]
        error = sum(count * abs(confidence - accuracy) for count, confidence, accuracy in numbers)
        assert metrics[f"expected_calibration_error{suffix}"] == pytest.approx(error / len(labels))
    rows = list(csv.reader((run_folder / "confusion.csv").read_text().splitlines()))
    classes = list(csv.DictReader((run_folder / "classes.csv").read_text().splitlines()))
    for k, name in enumerate(("cat", "dog", "eel")):
        counts = [int(np.sum((labels == k) & (predicted == other))) for other in range(3)]
        assert rows[k + 1] == [name, *map(str, counts)]
        assert float(classes[k]["recall"]) == pytest.approx(counts[k] / sum(counts))
        if times_named := int(np.sum(predicted == k)):
            assert float(classes[k]["precision"]) == pytest.approx(counts[k] / times_named)
        else:
            assert classes[k]["precision"] == ""
        assert (classes[k]["class"], int(classes[k]["images"])) == (name, sum(counts))
    for figure in ("confusion.png", "training.png", "mistakes.png", "reliability.png"):
        assert (run_folder / figure).read_bytes().startswith(b"\x89PNG")
    latency = json.loads((run_folder / "latency.json").read_text())
    assert latency["batch_1"]["onnxruntime"]["n"] == 3


@pytest.mark.slow
@pytest.mark.long
def test_evaluation_writes_the_same_bytes_each_time(run_folder: Path, dataset: DataSet) -> None:
    """All but the measured latency."""
    names = (
        "metrics.json",
        "confusion.csv",
        "disagreements.csv",
        "confusion.png",
        "training.png",
        "mistakes.png",
        "reliability.png",
        "reliability.csv",
        "parity.csv",
    )
    evaluate_run(run_folder, dataset, HISTORY, CONFIG, NUM_BINS)
    first = {name: (run_folder / name).read_bytes() for name in names}
    evaluate_run(run_folder, dataset, HISTORY, CONFIG, NUM_BINS)
    assert {name: (run_folder / name).read_bytes() for name in names} == first


def test_disagreements_are_listed_and_only_near_ties_pass() -> None:
    """Spread 10, so 2e-6 allows 2e-5 each way: a margin of 3e-5 may turn, one of 1e-2 may not."""
    reference = np.array([[0.0, 10.0], [1.0, 1.0 - 3e-5], [2.0, 1.99]])
    turned = np.array([[0.0, 10.0], [1.0 - 2e-5, 1.0 - 1e-5], [1.98, 1.99]])
    parity = compare_logits(reference, turned, batch_size=7, threads=1, max_relative_logit_diff=TOLERANCE)
    listed = [(found.image_index, round(found.margin, 6), found.near_tie) for found in parity.disagreements]
    assert listed == [(1, 3e-5, True), (2, 0.01, False)]
    faults = parity_faults([parity], 1.0)
    assert faults == ["batch 7: image 2 is class 0 in PyTorch and 1 in ONNX, margin 0.01"]
    near = compare_logits(reference[:2], turned[:2], batch_size=7, threads=1, max_relative_logit_diff=3e-6)
    assert parity_faults([near], 3e-6) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_never_pass(value: float) -> None:
    reference = np.array([[0.0, 1.0]])
    parity = compare_logits(
        reference, np.array([[0.0, value]]), batch_size=1, threads=1, max_relative_logit_diff=TOLERANCE
    )
    assert parity_faults([parity], TOLERANCE)


def test_parity_uses_every_image(run_folder: Path) -> None:
    """13 images in batches of 5 are 5, 5 and 3; order is kept."""
    images = random_images(13)
    artifact = open_artifact(run_folder / "model.onnx", "cpu")
    one_by_one = np.concatenate([artifact.run(image[None])[0] for image in images])
    np.testing.assert_allclose(onnx_logits(artifact, images, 5), one_by_one, atol=1e-5)
    np.testing.assert_allclose(Reference(make_weights()).logits(images), one_by_one, atol=1e-4)


def test_files_of_two_runs_are_not_compared(run_folder: Path, dataset: DataSet) -> None:
    other = load_weights(run_folder / "weights.safetensors")
    save_weights(
        run_folder / "weights.safetensors", replace(other, info=replace(other.info, fingerprint="f" * 16))
    )
    with pytest.raises(ModelError, match="its run is"):
        evaluate_run(run_folder, dataset, HISTORY, CONFIG, NUM_BINS)

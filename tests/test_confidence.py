"""Temperature and calibration error against arithmetic by hand, torch, and scikit-learn's curve."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import export_to, make_weights, random_images, train_alone, train_config
from pruned_runs import belonging_to
from sklearn.calibration import calibration_curve

from sdpipe.data.store import DataSet
from sdpipe.deploy.calibrate import calibrate_run
from sdpipe.deploy.confidence import (
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    read_temperature,
    reliability,
)
from sdpipe.deploy.config import CalibrateConfig
from sdpipe.deploy.held_out import open_held_out
from sdpipe.deploy.proof.parity import Reference
from sdpipe.deploy.pruning.recalibrate import score
from sdpipe.errors import DataError, ModelError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.weights import save_weights


def overconfident(num: int, factor: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(z), and the logits `factor` z: the right temperature is the factor."""
    rng = np.random.default_rng(seed)
    true_NK = rng.normal(0, 1.5, (num, 4))
    chances_NK = np.exp(true_NK) / np.exp(true_NK).sum(axis=1, keepdims=True)
    labels_N = np.array([rng.choice(4, p=chances) for chances in chances_NK])
    return (factor * true_NK).astype(np.float32), labels_N


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_again(factor: float) -> None:
    """20,000 labels drawn from softmax(z) and logits of `factor` z: T is the factor, to 5 %."""
    logits, labels = overconfident(20_000, factor)
    assert fit_temperature(logits, labels) == pytest.approx(factor, rel=0.05)


def test_no_other_temperature_is_more_likely() -> None:
    """Against a grid, with PyTorch's cross-entropy in float64."""
    logits, labels = overconfident(500, 2.0, seed=1)
    best = fit_temperature(logits, labels)
    tensors = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    losses = [
        torch.nn.functional.cross_entropy(tensors[0] / T, tensors[1]) for T in np.geomspace(0.1, 10, 400)
    ]
    found = negative_log_likelihood(logits, labels, best)
    assert found == pytest.approx(torch.nn.functional.cross_entropy(tensors[0] / best, tensors[1]).item())
    assert found <= min(losses) + 1e-9


def test_without_a_mistake_confidence_is_left_alone() -> None:
    """The likelihood would ask for T = 0, which 3 right images do not justify."""
    assert fit_temperature(np.eye(3, dtype=np.float32), np.arange(3)) == 1.0


def test_calibration_error_by_hand() -> None:
    """Two bins of (0.5, 1]: 0.9, 0.8, 0.6 with one mistake; 1 image at 0.4.

    In 5 bins: (0.2, 0.4] 0.4 wrong -> 0.4; (0.4, 0.6] 0.6 right -> 0.4; (0.6, 0.8] 0.8 right -> 0.2;
    (0.8, 1] 0.9 wrong -> 0.9. Their mean is (0.4 + 0.4 + 0.2 + 0.9) / 4 = 0.475.
    """
    probabilities = np.array([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])
    bins = reliability(probabilities, np.array([1, 0, 1, 0]), 5)
    assert [each.num_images for each in bins] == [0, 1, 1, 1, 1]
    assert expected_calibration_error(bins) == pytest.approx(0.475)


def test_the_bins_are_those_of_scikit_learn() -> None:
    logits, labels = overconfident(3_000, 2.0)
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    filled = [each for each in reliability(probabilities, labels, 15) if each.num_images]
    right = probabilities.argmax(axis=1) == labels
    accuracy, confidence = calibration_curve(right, probabilities.max(axis=1), n_bins=15)
    assert [each.accuracy for each in filled] == pytest.approx(accuracy.tolist())
    assert [each.confidence for each in filled] == pytest.approx(confidence.tolist())


@pytest.mark.slow
def test_the_file_divides_its_logits(tmp_path: Path) -> None:
    """probabilities = softmax(logits / T), by one more Div; the logits are those of the file without it."""
    plain = open_artifact(export_to(tmp_path / "plain.onnx", make_weights()), "cpu")
    path = export_to(tmp_path / "tempered.onnx", make_weights(), temperature=2.5)
    tempered = open_artifact(path, "cpu")
    images = random_images(7)
    logits, probabilities = tempered.run(images)
    np.testing.assert_array_equal(logits, plain.run(images)[0])
    expected = torch.from_numpy(logits).double().div(2.5).softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert tempered.metadata.temperature == 2.5
    assert tempered.operators["Div"] == plain.operators["Div"] + 1


def test_calibration_sees_the_validation_part_only(tmp_path: Path, dataset: DataSet) -> None:
    """The split is the training's own: 24 of 120 images, none of which it trained on; figures by torch."""
    from dataclasses import replace

    config = train_config()
    result = train_alone(config, dataset, tmp_path / "checkpoints")
    weights = make_weights(widths=(4, 8, 8))
    params = {"validation": config.validation, "seed": config.seed}
    weights = replace(weights, info=replace(weights.info, dataset_digest=dataset.digest, train_params=params))
    trained, validated = open_held_out(weights.info, dataset)
    assert (len(trained), len(validated)) == (result.num_train, result.num_validation) == (96, 24)
    assert not set(trained.indices) & set(validated.indices)
    np.testing.assert_array_equal(validated[3:5], dataset.train_images[validated.indices[3:5]])
    save_weights(tmp_path / "weights.safetensors", weights)
    calibrate_run(tmp_path, dataset, CalibrateConfig(num_bins=15))
    facts = json.loads((tmp_path / "calibration.json").read_text())
    assert facts["num_validation"] == 24
    logits_NK = torch.from_numpy(Reference(weights).logits(validated)).double()
    labels_N = torch.from_numpy(validated.labels_N)
    for name, temperature in (("uncalibrated", 1.0), ("calibrated", facts["temperature"])):
        nll = torch.nn.functional.cross_entropy(logits_NK / temperature, labels_N).item()
        assert facts[f"validation_nll_{name}"] == pytest.approx(nll, rel=1e-6)
        confidence_N, named_N = (logits_NK / temperature).softmax(dim=1).max(dim=1)
        off_N, bin_N = confidence_N - (named_N == labels_N).double(), (confidence_N * 15).ceil()
        ece = sum(abs(off_N[bin_N == number].sum().item()) for number in range(1, 16)) / 24
        assert facts[f"validation_ece_{name}"] == pytest.approx(ece, rel=1e-6)
    assert facts["validation_nll_calibrated"] <= facts["validation_nll_uncalibrated"]
    assert read_temperature(tmp_path / "calibration.json") == facts["temperature"]
    other = replace(weights, info=replace(weights.info, dataset_digest="e" * 64))
    save_weights(tmp_path / "weights.safetensors", other)
    with pytest.raises(DataError, match="trained on the data eeee"):
        calibrate_run(tmp_path, dataset, CalibrateConfig(num_bins=15))


def test_logits_that_are_not_finite_are_no_calibration(tmp_path: Path, dataset: DataSet) -> None:
    """Each weight is, and float32 does not hold what they compute."""
    weights = belonging_to(make_weights(), dataset)
    weights.state["head.weight"].fill_(3e38)
    save_weights(tmp_path / "weights.safetensors", weights)
    assert all(tensor.isfinite().all() for tensor in weights.state.values())
    with pytest.raises(ModelError, match=r"weights\.safetensors: computes logits that are not finite"):
        calibrate_run(tmp_path, dataset, CalibrateConfig(num_bins=15))
    assert not (tmp_path / "calibration.json").exists()


def test_a_damaged_calibration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text('{"temperature": -1}')
    with pytest.raises(DataError, match=r"calibration\.json: expected a positive temperature, got -1"):
        read_temperature(path)


def test_networks_without_a_mistake_rank_before_others() -> None:
    """At its best temperature such a network has the likelihood 1, whatever it has at T = 1.

    There -log softmax is 0.55 at a margin of 1, and the other's is about 0.06 at its best temperature.
    """
    labels = np.arange(100) % 3
    timid, sure, surest = (
        score(margin * np.eye(3, dtype=np.float32)[labels], labels) for margin in (1, 3, 9)
    )
    wrong = 9 * np.eye(3, dtype=np.float32)[labels]
    wrong[0] = [0, 9, 0]
    with_a_mistake = score(wrong, labels)
    assert with_a_mistake.nll < timid.nll == pytest.approx(np.log(1 + 2 / np.e))
    assert surest.rank < sure.rank < timid.rank < with_a_mistake.rank
    assert surest.temperature == timid.temperature == 1.0 != with_a_mistake.temperature

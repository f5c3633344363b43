"""What evaluate refuses to prove, and what the proof finds besides wrong logits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import CLASS_NAMES, make_weights
from deployable import deploy_config
from onnx import numpy_helper
from pruned_runs import EXPORT
from quantized_runs import QUICK, make_quantized_run
from test_evaluate import CONFIG, HISTORY, NUM_BINS, make_run

from sdpipe.data.store import DataSet
from sdpipe.deploy.export import export_ensemble
from sdpipe.deploy.files_of_run import files_of_run
from sdpipe.deploy.proof import evaluate as evaluating
from sdpipe.deploy.proof import variants
from sdpipe.deploy.proof.claims import claim_faults
from sdpipe.deploy.proof.evaluate import evaluate_run
from sdpipe.deploy.proof.parity import COARSEST
from sdpipe.deploy.proof.scores import SCORES, write_classes
from sdpipe.deploy.release.release import judge
from sdpipe.deploy.timing.latency import measure_latency
from sdpipe.errors import DataError, ModelError, ParityError
from sdpipe.files import read_json, write_json
from sdpipe.provenance import hardware, processor_name
from sdpipe.runtime.artifact import Artifact, open_artifact
from sdpipe.training.weights import load_info, load_tensors, load_weights, save_tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dataset: DataSet) -> Path:
    return make_quantized_run(tmp_path_factory.mktemp("models") / "run", dataset)


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """A sound run with all its variants, to be damaged."""
    return shutil.copytree(made, tmp_path / "run")


def evaluate(run: Path, dataset: DataSet) -> None:
    evaluate_run(run, dataset, HISTORY, QUICK, NUM_BINS)


def test_a_run_is_not_tested_on_other_data(run: Path, dataset: DataSet) -> None:
    """Its training images as another set's test part would give an error that is none of new images."""
    trained_on = np.asarray(dataset.train_images[:30])
    other = replace(dataset, digest="f" * 64, test_images_NHWC=trained_on)
    with pytest.raises(DataError, match=f"was trained on the data {dataset.digest[:16]}.* is ffff"):
        evaluate(run, other)
    assert not (run / "metrics.json").exists()


def say(path: Path, **claims: Any) -> None:
    """Change what a file says of itself, and nothing that it computes."""
    model = onnx.load(path)
    for entry in model.metadata_props:
        field = entry.key.removeprefix("sdpipe.")
        if field in claims:
            entry.value = json.dumps(claims[field])
    onnx.save(model, path)


FILES = {
    "model.onnx": "weights.safetensors",
    "ensemble.onnx": "weights.safetensors",
    "model.int8.onnx": "weights.safetensors",
    "pruned/keep-7.onnx": "pruned/keep-7.safetensors",
    "pruned-int8/keep-7.int8.onnx": "pruned/keep-7.safetensors",
}
CLAIMS: dict[str, Any] = {
    "class_names": ["dog", "eel", "cat"],
    "image_size": [9, 8],
    "channels": 3,
    "crop_fraction": 0.5,
    "data_set": "imagenet",
    "data_digest": "0" * 64,
    "depth": 56,
    "rule": "uniform",
    "p_L": 0.75,
    "survival_probs": [0.5] * 9,
    "scales": [0.5] * 9,
    "temperature": 7.0,
    "best_epoch": 1,
    "fingerprint": "f" * 16,
}


@pytest.mark.parametrize("file", FILES)
def test_every_claim_of_every_file_is_compared_with_its_weights(run: Path, file: str) -> None:
    """One that is wrong is said, and no other; the sound file says nothing wrong."""
    weights = run / FILES[file]
    metadata, info = open_artifact(run / file, "cpu").metadata, load_info(weights)
    assert claim_faults(metadata, info, weights) == []
    for name, value in CLAIMS.items():
        (fault,) = claim_faults(replace(metadata, **{name: value}), info, weights)
        assert fault.startswith(f"its {name} is ")
    of_people = {"schema_version", "variant", "resize", "crop", "sdpipe_version"}
    assert CLAIMS.keys() == vars(metadata).keys() - of_people


def test_a_class_without_images_has_no_recall(tmp_path: Path) -> None:
    """Of 3 classes the second is never predicted, and of the third there is no image."""
    predicted_N, labels_N = np.array([0, 0, 2, 0]), np.array([0, 0, 1, 1])
    write_classes(tmp_path, np.eye(3)[predicted_N], labels_N, CLASS_NAMES, "title")
    assert (tmp_path / "classes.csv").read_text().splitlines()[1:] == [
        f"cat,{2 / 3},1.0,2", "dog,,0.0,2", "eel,0.0,,0",
    ]  # fmt: skip


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (7, 1), (256, 1), (256, 2)])
def test_each_way_of_running_a_file_is_judged(
    run: Path, dataset: DataSet, monkeypatch: pytest.MonkeyPatch, batch_size: int, threads: int
) -> None:
    """A difference of 1e-3 of the spread at one batch size alone, or on one number of threads."""
    sound = variants.onnx_outputs

    def off(artifact: Artifact, images_NHWC: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        logits_NK, probabilities_NK = sound(artifact, images_NHWC, size)
        num_threads = artifact.session.get_session_options().intra_op_num_threads
        share = 1e-3 if (size, num_threads) == (batch_size, threads) else 0
        return logits_NK + share * np.ptp(logits_NK), probabilities_NK

    monkeypatch.setattr(variants, "onnx_outputs", off)
    model, *_ = files_of_run(run)
    proof = variants.prove(model, load_weights(model.weights), {}, dataset.test_images_NHWC, CONFIG)
    wrong = [each for each in proof.parities if each.relative_logit_diff > 5e-4]
    assert [(each.batch_size, each.threads) for each in wrong] == [(batch_size, threads)]
    said = [fault for fault in proof.faults if fault.startswith(f"batch {batch_size}: logits differ by")]
    assert len(said) == 1


def test_a_history_without_the_best_epoch_is_refused(run: Path, dataset: DataSet) -> None:
    """Before anything is computed."""
    for history, said in (([HISTORY[0]], "a row of epoch 2"), ([{"epoch": 2.0}], "columns epoch")):
        with pytest.raises(DataError, match=rf"history\.csv: expected {said}"):
            evaluate_run(run, dataset, history, QUICK, NUM_BINS)
    assert not (run / "parity.csv").exists()


@pytest.mark.slow
def test_what_is_timed_computes_with_as_many_threads_each(
    run: Path, dataset: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the process may use, not what PyTorch takes; the card names the machine with them."""
    taken: dict[str, int] = {}

    def counting(calls: dict[str, Any], *rest: Any) -> dict[str, Any]:
        sessions = {name: call.__self__.session for name, call in calls.items() if name != "pytorch_eager"}
        counts = {name: one.get_session_options().intra_op_num_threads for name, one in sessions.items()}
        taken.update({**counts, "pytorch_eager": torch.get_num_threads()})
        return measure_latency(calls, *rest)

    monkeypatch.setattr(evaluating, "measure_latency", counting)
    monkeypatch.setattr(evaluating, "num_threads", lambda: 3)
    evaluate(run, dataset)
    assert taken == dict.fromkeys(
        ("pytorch_eager", "onnxruntime", "int8", "fp16", "keep-7", "keep-7.int8"), 3
    )
    assert torch.get_num_threads() == 1
    latency = read_json(run / "latency.json")
    assert latency.keys() == {"hardware", "batch_1"}
    assert latency["hardware"] == hardware(processor_name(), num_threads=3)
    assert latency["batch_1"].keys() == taken.keys()


@pytest.mark.slow
def test_a_file_with_a_wrong_claim_fails(
    run: Path, dataset: DataSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """A float32 file and the ensemble stop the stage; int8 is named and marked."""
    for file in ("model.onnx", "ensemble.onnx", "model.int8.onnx"):
        say(run / file, class_names=CLAIMS["class_names"])
    said = r'parity fails: its class_names is \["dog", "eel", "cat"\], and \["cat", "dog", "eel"\] in weights'
    with pytest.raises(ParityError, match=rf"model\.onnx: {said}.*ensemble\.onnx: {said}"):
        evaluate(run, dataset)
    assert "model.int8.onnx: not to be deployed, parity fails: its class_names" in capsys.readouterr().out
    metrics = read_json(run / "metrics.json")
    assert metrics["parity"] is False
    parities = {name: figures["parity"] for name, figures in metrics["variants"].items()}
    assert parities == {"fp16": True, "int8": False, "keep-7": True, "keep-7.int8": True, "ensemble": False}


@pytest.mark.parametrize(
    "claims",
    [
        {"class_names": ["dog", "cat", "eel"]},
        {"image_size": [9, 8]},
        {"crop_fraction": 0.5},
        {"dataset": "imagenet"},
        {"best_epoch": 1},
        {"fingerprint": "f" * 16},
        {"train_params": {}},
        {"rule": "uniform"},
        {"p_L": 0.75},
    ],
    ids=lambda claims: next(iter(claims)),
)
def test_pruned_weights_say_what_the_runs_do(run: Path, dataset: DataSet, claims: dict[str, Any]) -> None:
    """With the same mistake in the file and in the weights that it is held to, these two agree."""
    path = run / "pruned" / "keep-7.safetensors"
    tensors, meta = load_tensors(path)
    for name, value in claims.items():
        (meta["network"] if name in meta["network"] else meta)[name] = value
    save_tensors(path, tensors, meta)
    say(run / "pruned" / "keep-7.onnx", **claims)
    (name,) = claims
    with pytest.raises(ModelError, match=rf"keep-7\.safetensors: its {name} is .* in weights\.safetensors"):
        evaluate(run, dataset)


@pytest.mark.slow
def test_the_ensembles_probabilities_are_proved(run: Path, dataset: DataSet) -> None:
    """Its graph divides the logits by 2.5 where it says 1.25: the same logits, other probabilities."""
    path = run / "ensemble.onnx"
    export_ensemble(load_weights(run / "weights.safetensors"), path, EXPORT, temperature=2.5)
    say(path, temperature=1.25)
    with pytest.raises(ParityError, match=r"ensemble\.onnx: parity fails: probabilities are .* off softmax"):
        evaluate(run, dataset)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_rounded_file_that_computes_no_numbers_is_marked(
    run: Path, dataset: DataSet, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """A number beyond float16 became an infinity there: the float32 file is released without it."""
    set_number(run / "model.fp16.onnx", "head.bias", value)
    evaluate(run, dataset)
    assert "model.fp16.onnx: not to be deployed, parity fails: batch 32: logits" in capsys.readouterr().out
    metrics = read_json(run / "metrics.json")
    found = metrics["variants"]["fp16"]
    assert [found[name] for name in ("parity", *SCORES, "error_increase")] == [False, None, None, None, None]
    candidate = judge(run, deploy_config(max_test_error=1.0))
    assert candidate.left_out["fp16"] == "its parity did not hold"


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_float32_file_that_computes_no_numbers_fails(run: Path, dataset: DataSet, value: float) -> None:
    set_number(run / "model.onnx", "head.bias", value)
    with pytest.raises(ParityError, match=r"model\.onnx: parity fails: batch 32: logits differ by inf"):
        evaluate(run, dataset)
    metrics = read_json(run / "metrics.json")
    assert [metrics[name] for name in ("parity", *SCORES)] == [False, None, None, None]


def set_number(path: Path, name: str, value: float) -> None:
    model = onnx.load(path)
    (tensor,) = [each for each in model.graph.initializer if each.name.endswith(name)]
    numbers = numpy_helper.to_array(tensor).copy()
    numbers.reshape(-1)[0] = value
    tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("name", ["network.stem.bn.running_var", "normalisation.mean_HWC"])
def test_weights_that_are_not_finite_are_refused(run: Path, name: str) -> None:
    """One number of one tensor, which is named."""
    path = run / "weights.safetensors"
    tensors, meta = load_tensors(path)
    tensors[name].reshape(-1)[0] = np.nan
    save_tensors(path, tensors, meta)
    with pytest.raises(ModelError, match=rf"weights\.safetensors: {name} holds numbers that are not finite"):
        load_weights(path)


@pytest.mark.slow
def test_a_network_that_rounds_too_coarsely_is_not_proved(tmp_path: Path, dataset: DataSet) -> None:
    """Logits about 2,000 that differ by 4: float32's steps there are 3e-5 of that; the file is sound."""
    weights = make_weights()
    weights.state["head.bias"] += 2000
    folder = make_run(tmp_path / "coarse", weights, dataset)
    coarse = "parity fails: the network rounds too coarsely to be proved"
    with pytest.raises(ParityError, match=rf"model\.onnx: {coarse}.*ensemble\.onnx: {coarse}"):
        evaluate(folder, dataset)
    metrics = read_json(folder / "metrics.json")
    assert (metrics["parity"], metrics["allowed_relative_logit_diff"]) == (False, COARSEST)


@pytest.mark.slow
def test_a_pruned_networks_temperature_is_that_of_prune_json(run: Path, dataset: DataSet) -> None:
    path = run / "pruned" / "prune.json"
    facts = read_json(path)
    facts["sizes"][0]["recalibrated"]["temperature"] = 9.0
    write_json(path, facts)
    with pytest.raises(ParityError, match=r"keep-7\.onnx: .* its temperature is 1\.25, and 9 in prune\.json"):
        evaluate(run, dataset)
    write_json(path, {"sizes": []})
    with pytest.raises(DataError, match=r"prune\.json: expected the temperature of keep-7"):
        evaluate(run, dataset)

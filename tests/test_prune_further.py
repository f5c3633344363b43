"""`sdpipe prune --keep`: further sizes of the runs."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_weights
from pruned_runs import belonging_to
from test_prune_command import call, compared, runs, stochastic  # noqa: F401  two are fixtures

from sdpipe.data.store import DataSet
from sdpipe.files import read_json, write_json
from sdpipe.training.weights import save_weights


@pytest.mark.slow
def test_a_size_stands_in_the_table_once(runs: Path) -> None:  # noqa: F811
    """Whether it was asked for after the stage made it, or before."""
    run = runs / "stochastic"
    assert call("--keep", "3,2").exit_code == 0
    assert not (run / "pruned-extra" / "keep-3.onnx").exists()
    shutil.copy(run / "pruned" / "keep-3.onnx", run / "pruned-extra")
    assert call().exit_code == 0
    paths = [row["path"].removeprefix("models/stochastic/") for row in compared(runs)]
    assert paths == ["model.onnx", "pruned/keep-5.onnx", "pruned/keep-3.onnx", "pruned-extra/keep-2.onnx"]


@pytest.mark.slow
def test_all_runs_are_judged_before_the_first_size_is_made(
    runs: Path,  # noqa: F811
    dataset: DataSet,
) -> None:
    """One that has no such size is compared as it is, or refused if it was named; so is one of other data."""
    for name in ("plain", "shallow", "other"):
        shutil.copytree(runs / "stochastic", runs / name)
    path = runs / "plain" / "pruned" / "prune.json"
    write_json(path, read_json(path) | {"why_empty": "without skips no block can be removed"})
    shallow = belonging_to(make_weights(depth=8), dataset)
    other = replace(shallow, info=replace(shallow.info, dataset_digest="0" * 64))
    for name, weights in (("shallow", shallow), ("other", other)):
        save_weights(runs / name / "weights.safetensors", weights)
    said = {
        "plain": "models/plain: without skips no block can be removed",
        "shallow": "models/shallow: expected 1 to 2 of its 3 blocks, got 4",
        "other": "models/stochastic, models/other: trained on different data; compare one data set at a time",
    }
    for name, message in said.items():
        result = call("models/stochastic", f"models/{name}", "--keep", 4)
        assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    assert not list(runs.glob("*/pruned-extra"))
    shutil.rmtree(runs / "other")
    result = call("--keep", 4)
    assert result.exit_code == 0, result.output
    for name in ("plain", "shallow"):
        assert f"note: {said[name]}; its files are compared as they are\n" in result.stderr
    assert [path.parent.parent.name for path in runs.glob("*/pruned-extra/*.onnx")] == ["stochastic"]
    expected = [*["plain"] * 3, *["shallow"] * 3, *["stochastic"] * 4]
    assert [row["run"] for row in compared(runs)] == expected

"""The small twins of recipes through their stages, cut to one epoch."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from sdpipe.recipes import apply_recipe
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.run_files import read_rows

pytestmark = pytest.mark.slow


def stage(name: str, argument: str) -> None:
    """What `python -m pipeline.<name> <argument>` does, without its imports each time."""
    importlib.import_module(f"pipeline.{name}").main(argument)


def prepare(project: Path, name: str) -> dict[str, Any]:
    """A project with this recipe at one epoch; returns its params."""
    for code in ("sdpipe", "pipeline", "dvc.yaml"):
        (project / code).symlink_to(ROOT / code)
    params = YAML(typ="safe").load(apply_recipe(name, ROOT / "params.yaml"))
    params["train"]["epochs"] = 1
    params["machine"]["workers"] = 1
    params["evaluate"]["latency_repeats"] = 3
    with (project / "params.yaml").open("w") as stream:
        YAML(typ="safe").dump(params, stream)
    return params


# svhn-small validates after 6, 12, 18 and 20 of 20 steps: 1,437 images less 140, 64 a step.
@pytest.mark.parametrize(
    ("name", "run", "validations"),
    [
        ("svhn-small", "stochastic", [0.3, 0.6, 0.9, 1]),
        pytest.param("imagenet-small", "stochastic", [1], marks=pytest.mark.long),
        pytest.param("degradation-small", "plain-d8", [1], marks=pytest.mark.long),
    ],
)
def test_a_twin_runs_from_its_data_to_a_proved_file(
    mlflow_store: Path, project: Path, name: str, run: str, validations: list[float]
) -> None:
    """The file answers as the training's network does, on every test image."""
    train = prepare(project, name)["train"]
    stage("fetch", train["dataset"])
    for each in ("train", "fold", "calibrate", "export", "evaluate"):
        stage(each, run)
    folder = project / "models" / run
    metrics = json.loads((folder / "metrics.json").read_text())
    trained = json.loads((folder / "train.json").read_text())
    assert metrics["parity"] is True
    assert metrics["test_error"] == metrics["test_error_pytorch"] == trained["test_error"]
    depth = 8 if run == "plain-d8" else train["depth"]
    assert open_artifact(folder / "model.onnx", "cpu").metadata.depth == depth
    assert [row["epoch"] for row in read_rows(folder / "history.csv")] == pytest.approx(validations)

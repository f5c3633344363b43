"""The deployed model in MLflow's registry: a version for each file, and an alias that only `deploy` moves."""

import json
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import numpy as np
import onnx
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import ROOT, random_images
from deployable import change_metrics, deploy, deploy_config, make_run, sha256
from mlflow import MlflowClient
from test_tracking import RECORD

from pipeline.deploy import main as deploy_stage
from sdpipe.cli import main
from sdpipe.deploy.release import carried, registry
from sdpipe.deploy.release.carried import SHIPPED, carried_digest
from sdpipe.deploy.release.registry import register, register_quietly
from sdpipe.errors import DataError, GateError, TrackingError
from sdpipe.runtime.artifact import open_artifact
from sdpipe.training.mlflow_store import prepare
from sdpipe.training.tracking import publish


def make_other(folder: Path) -> None:
    """The same network as another file, as if it were trained again."""
    model = onnx.load(folder / "model.onnx")
    model.producer_name = "again"
    onnx.save(model, folder / "model.onnx")
    change_metrics(folder, model_sha256=sha256(folder / "model.onnx"), test_error=0.05)


def test_a_version_for_each_file_and_the_alias_on_the_deployed_one(project: Path, mlflow_store: Path) -> None:
    """Twice the same file is one version; another file is a second one, and the alias goes with it.

    A run that fails its gate is never registered, and the alias stays. The model answers like the file.
    """
    folder, models = make_run(project / "models" / "stochastic"), project / "models"
    deploy(folder, models)
    assert register(models) == register(models) == "1"
    client = MlflowClient(f"sqlite:///{mlflow_store}")
    (first,) = client.search_model_versions("name = 'sdpipe'")
    assert first.tags == {
        "code_sha256": carried_digest(),
        "fingerprint": "0123456789abcdef",
        "run": "stochastic",
        "sha256": sha256(folder / "model.onnx"),
        "test_error": "0.1",
    }
    run = client.get_run(first.run_id)
    assert run.data.tags["fingerprint"] == "0123456789abcdef"
    assert run.info.end_time - run.info.start_time == 77_000  # as the training's timing.json says
    assert_answers_like(models / "model.onnx", project)

    make_other(folder)
    with pytest.raises(GateError):
        deploy(folder, models, max_test_error=0.01)
    assert champion(client) == "1"
    deploy(folder, models)
    assert register(models) == "2"
    assert champion(client) == "2"
    assert client.get_run(first.run_id).info.end_time == run.info.end_time
    assert len(client.search_model_versions("name = 'sdpipe'")) == 2


def test_a_version_whose_files_are_gone_is_registered_again(project: Path, mlflow_store: Path) -> None:
    """As where mlartifacts/ was removed: the alias would stand for nothing for ever."""
    models = project / "models"
    deploy(make_run(models / "stochastic"), models)
    assert register(models) == "1"
    shutil.rmtree(project / "mlartifacts")
    assert register(models) == register(models) == "2"
    assert_answers_like(models / "model.onnx", project)
    client = MlflowClient()
    source = str(client.get_model_version("sdpipe", "2").source)
    client.delete_logged_model(source.removeprefix("models:/"))  # as by hand in MLflow's UI
    assert register(models) == register(models) == "3"


def test_changed_code_is_a_version_of_its_own(
    project: Path,
    mlflow_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server answers with the code that the version carries: a mend of it would never reach the registry.

    So it is where a version does not say which code it carries. A process that has imported other code, as
    this one, answers with that, and says so.
    """
    models = project / "models"
    deploy(make_run(models / "stochastic"), models)
    assert register(models) == "1"
    package = tmp_path / "sdpipe"
    for name in SHIPPED:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "sdpipe" / name, package / name)
    monkeypatch.setattr(carried, "PACKAGE", package)
    monkeypatch.setattr(registry, "PACKAGE", package)
    assert register(models) == "1"
    with (package / "runtime" / "serving.py").open("a") as code:
        code.write("\nNUM_TOP = 1\n")
    client = MlflowClient()
    assert register(models) == champion(client) == "1"  # as `sdpipe track` does: that code was not deployed
    assert "`dvc repro deploy` registers it" in capsys.readouterr().err
    deploy(models / "stochastic", models)
    assert register(models) == register(models) == champion(client) == "2"
    for version, num_warnings in (("1", 0), ("2", 1)):
        caplog.clear()
        mlflow.pyfunc.load_model(f"models:/sdpipe/{version}")
        assert [each.name for each in caplog.records].count("sdpipe") == num_warnings
    assert "load the model in a process of its own" in caplog.text
    client.delete_model_version_tag("sdpipe", "2", "code_sha256")
    assert register(models) == champion(client) == "3"
    client.delete_model_version_tag("sdpipe", "3", "code_sha256")
    (package / "errors.py").write_text("")
    assert register(models) == champion(client) == "3"  # what was not deployed is not registered


@pytest.mark.slow
@pytest.mark.parametrize("bring", [shutil.move, shutil.copytree])
def test_a_project_that_is_moved_or_copied_takes_its_models_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bring: Callable[[Path, Path], object]
) -> None:
    """MLflow notes whole addresses: they follow, also a second time; nothing is written to the old folder."""

    def enter(project: Path) -> Path:
        monkeypatch.setenv("DVC_ROOT", str(project))
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow keeps it there
        monkeypatch.chdir(project)
        return project / "models"

    (before := tmp_path / "Über uns 100%").mkdir()
    models = enter(before)
    deploy(make_run(models / "stochastic"), models)
    assert register(models) == "1"
    for after in (tmp_path / "new", tmp_path / "deeper" / "newer"):
        after.parent.mkdir(exist_ok=True)
        bring(before, after)
        old = sorted(before.rglob("*")) if before.exists() else []
        models = enter(after)
        prepare()
        assert_answers_like(models / "model.onnx", after)
        assert register(models) == "1"
        for artifacts in stored_addresses(after / "mlflow.db"):
            assert artifacts.startswith((after / "mlartifacts").as_uri()), artifacts
        assert_answers_like(models / "model.onnx", after)
        assert (sorted(before.rglob("*")) if before.exists() else []) == old
        before = after


def test_artifacts_that_stayed_are_left_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: Path, project: Path
) -> None:
    """As when the database alone was copied, or lies in another project."""
    deploy(make_run(project / "models" / "stochastic"), project / "models")
    register(project / "models")
    before = stored_addresses(mlflow_store)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_store}")
    (tmp_path / "mlartifacts").mkdir()
    register(project / "models")
    assert stored_addresses(mlflow_store) == before
    (tmp_path / "mlartifacts").rmdir()
    shutil.copy(mlflow_store, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    register(project / "models")
    assert stored_addresses(tmp_path / "mlflow.db") == before


def test_artifacts_of_another_project_stay_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path
) -> None:
    """Which logs to the database of this one; their folders are of one name."""
    for name in ("own", "other"):
        (tmp_path / name / "mlartifacts").mkdir(parents=True)
    shutil.copy(empty_store, store := tmp_path / "own" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    for name in ("own", "other", "own"):
        monkeypatch.setenv("DVC_ROOT", str(tmp_path / name))
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        run_id = publish(RECORD)
        run = MlflowClient().get_run(run_id)
        assert run.info.artifact_uri.startswith(f"{(tmp_path / name / 'mlartifacts').as_uri()}/")
        if name == "other":
            before = run.info
    assert MlflowClient().get_run(before.run_id).info.artifact_uri == before.artifact_uri


def stored_addresses(database: Path) -> list[str]:
    """All that the database has of folders for artifacts, in whatever table."""
    with closing(sqlite3.connect(database)) as connection:
        dump = "\n".join(connection.iterdump())
    found = re.findall(r"file://[^']*mlartifacts[^']*", dump)
    assert len(found) >= 4
    return found


def champion(client: MlflowClient) -> str:
    return str(client.get_model_version_by_alias("sdpipe", "champion").version)


def assert_answers_like(model_path: Path, project: Path) -> None:
    """In Python as a user loads it: labels and probabilities of the ONNX file."""
    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    loaded = mlflow.pyfunc.load_model("models:/sdpipe@champion")
    images = random_images(3)
    answers = loaded.predict(pd.DataFrame({"image": list(images.tolist())}))
    probabilities_NK = open_artifact(model_path, "cpu").run(images)[1]
    names = ("cat", "dog", "eel")
    assert [answer["label"] for answer in answers] == [names[k] for k in probabilities_NK.argmax(axis=1)]
    found = [[answer["probabilities"][name] for name in names] for answer in answers]
    np.testing.assert_allclose(found, probabilities_NK, rtol=1e-6)
    signature = loaded.metadata.signature
    assert signature.inputs.input_names() == ["image"]
    assert signature.outputs.input_names() == ["label", "probability", "top", "probabilities"]


def test_a_server_that_is_down_costs_a_warning_and_is_made_up_for(
    project: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The deployment stands; `sdpipe track` registers it when the store is there, and names the version."""
    models = project / "models"
    deploy(make_run(models / "stochastic"), models)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.perf_counter()
    register_quietly(models)
    assert time.perf_counter() - started < 15.5
    warning = capsys.readouterr().err
    assert warning.count("warning: MLflow") == 1
    assert "`sdpipe track` sends it later" in warning
    with pytest.raises(TrackingError):
        register(models)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    done = CliRunner().invoke(main, ["track", "models"])
    assert (done.exit_code, done.output) == (0, "models: version 1 in MLflow's registry\n")


@pytest.mark.slow
def test_a_server_that_never_answers_is_not_waited_for(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It accepts the connection and is silent; the stage goes on after its patience (shorter here)."""
    models = project / "models"
    deploy(make_run(models / "stochastic"), models)
    monkeypatch.setattr("sdpipe.training.tracking.PATIENCE_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.perf_counter()
        register_quietly(models)
        assert time.perf_counter() - started < 5
        assert capsys.readouterr().err.count("MLflow: no answer from http://127.0.0.1") == 1
        for thread in threading.enumerate():
            if thread.name == "mlflow":
                thread.join(30)


def test_what_is_not_whole_is_not_registered(project: Path) -> None:
    models = project / "models"
    deploy(make_run(models / "stochastic"), models)
    facts = json.loads((models / "deployed.json").read_text())
    (models / "deployed.json").write_text(json.dumps(facts | {"sha256": "0" * 64}))
    with pytest.raises(DataError, match="is not the file that"):
        register(models)
    (models / "deployed.json").write_text(json.dumps({"run": "stochastic"}))
    with pytest.raises(DataError, match="not written by this sdpipe"):
        register(models)


def test_an_experiment_in_a_copy_leaves_the_alias(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dvc exp run --temp` and `--queue` deploy into a copy; what is served is what the project has."""
    registered: list[Path] = []
    monkeypatch.setattr("pipeline.deploy.register_quietly", registered.append)
    for folder in (project, tmp_path):
        monkeypatch.chdir(folder)
        make_run(folder / "models" / "stochastic")
        params = {"deploy": deploy_config().model_dump()}
        (folder / "params.yaml").write_text(json.dumps(params))  # which is YAML, too
        deploy_stage()
        assert (folder / "models" / "model.onnx").exists()
        assert registered == [Path("models")]
    assert "not registered: an experiment in a copy of the project" in capsys.readouterr().out

"""What is another training, on another machine or of another setting, and what is said of it."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, machine, train_config
from imports import our_imports, stage_files
from session_runs import run_to
from test_training import StopAfter

from pipeline import train as stage
from sdpipe.data.store import DataSet
from sdpipe.errors import TrainingError
from sdpipe.training.loop import train
from sdpipe.training.progress import TrainResult
from sdpipe.training.session import train_run
from sdpipe.training.setting import Setting


@pytest.mark.slow
def test_other_threads_are_another_machine(
    dataset: DataSet, project: Path, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They round otherwise, so the weights are not those of a training that had the same ones all along."""
    num_threads = torch.get_num_threads()
    try:
        for epochs, threads in ((1, 3), (2, 5)):
            torch.set_num_threads(threads)
            run_to(project / "out", dataset, epochs=epochs, milestones=[])
    finally:
        torch.set_num_threads(num_threads)
    hardware = json.loads((project / "out" / "timing.json").read_text())["hardware"]
    assert re.fullmatch(r".*, 3 threads, then .*, 5 threads", hardware)
    assert "5 threads, after " in capsys.readouterr().out


def test_what_is_other_than_in_an_unfinished_training_is_said(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the newest one of that name; one of another name is none of this run's."""

    def stop_after(steps: int, run: str, code: str, **overrides: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sdpipe.training.session.train", partial(_stopped, steps))
            with pytest.raises(SystemExit):
                train_run(run, train_config(**overrides), machine(), dataset, code, project / "out")

    stop_after(4, "plain", "code", epochs=3, milestones=[])
    stop_after(5, "other", "code", epochs=6, milestones=[])
    capsys.readouterr()
    train_run("plain", train_config(epochs=3, milestones=[2]), machine(), dataset, "edited", project / "out")
    assert re.search(
        r"run plain: the unfinished training \w+ of 4 steps is another one: train.milestones was \[\], "
        "the code was another; starting from the beginning",
        capsys.readouterr().out,
    )


def _stopped(steps: int, *arguments: Any, **keywords: Any) -> TrainResult:
    return train(*arguments, **(keywords | {"interruption": StopAfter(steps)}))


@pytest.mark.parametrize("edited", ["params.yaml", "sdpipe/network.py", None])
def test_dvc_does_not_note_what_was_not_trained(
    project: Path, edited: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC reads params and code when a stage has ended; a change while it trained must end it as failed."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, project / name)
    for name in ("sdpipe", "pipeline"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("open_dataset", "check_arrays"):
        monkeypatch.setattr(stage, name, lambda _folder: None)
    monkeypatch.delenv("DVC_ROOT")  # its process would be ended with this one

    def train_and_edit(*_arguments: object, **_keywords: object) -> None:
        params = (project / "params.yaml").read_text()
        # What concerns the deployment only is no other training.
        params = params.replace("max_test_error: 0.02", "max_test_error: 0.03")
        (project / "params.yaml").write_text(params)
        if edited is not None:
            text = (project / edited).read_text()
            (project / edited).write_text(text.replace("  epochs: 120", "  epochs: 121") + "# edited\n")

    monkeypatch.setattr(stage, "train_run", train_and_edit)
    if edited is None:
        stage.main("stochastic")
        return
    with monkeypatch.context() as follower:  # of several processes the leader says it
        follower.setenv("RANK", "1")
        follower.setenv("WORLD_SIZE", "2")
        stage.main("stochastic")
    for name in ("params.yaml", "sdpipe/network.py"):
        shutil.copy(ROOT / name, project / name)
    with pytest.raises(TrainingError, match="run stochastic: params.yaml or the code was changed while"):
        stage.main("stochastic")


def test_differences_in_words() -> None:
    """The first three, keys in keys by their path, a missing one not as None."""
    params = {"a": 1, "gone": 2, "warmup": {"epochs": 0}}
    old = Setting(run="r", params=params, data="d", code="c", compute={"torch": "2"})
    params = {"a": 1, "crop": None, "warmup": {"epochs": 3}}
    new = Setting(run="r", params=params, data="e", code="c", compute={"torch": "3"})
    assert new.differences(old) == (
        "train.crop is new, train.warmup.epochs was 0, train.gone is no more, and 2 more"
    )
    assert replace(new, params=old.params).differences(old) == "torch was 2, the data were others"
    assert replace(old, code="x").differences(old) == "the code was another"


def test_a_folder_that_may_not_be_read_does_not_stop_a_training(
    project: Path, dataset: DataSet, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked into for a sentence only."""
    (project / ".sdpipe" / "runs" / "deadbeefdeadbeef").mkdir(parents=True)
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "deadbeefdeadbeef":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    run_to(project / "out", dataset, epochs=1, milestones=[])


def test_a_copy_that_dvc_exp_made_has_its_own_commit(
    project: Path, dataset: DataSet, mlflow_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC_ROOT is the checkout that it was copied from, which may be at another one by now."""
    copy = tmp_path / "copy"
    git = ["git", "-C", str(copy), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(copy)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.chdir(copy)
    run_to(project / "out", dataset, epochs=1, milestones=[])
    assert json.loads((project / "out" / "timing.json").read_text())["git_commit"] == commit.strip()


@pytest.mark.parametrize(
    ("lock", "found"),
    [
        ("stages:\n", None),
        ("stages: {train@plain: {outs: [{path: models/plain/weights.safetensors}]}}", None),
        ("stages: {train@plain: {outs: [{path: models/plain/weights.safetensors, md5: 12345678}]}}", None),
        ("stages: {train@plain: {outs: [{path: models/plain/weights.safetensors, md5: 5eb6}]}}", "5eb6"),
    ],
)
def test_what_a_lock_does_not_say_dvc_does_not_have(
    project: Path, monkeypatch: pytest.MonkeyPatch, lock: str, found: str | None
) -> None:
    """A lock that was merged by hand; a digest of digits alone is a number where it is not quoted."""
    monkeypatch.chdir(project)
    Path("dvc.lock").write_text(lock)
    assert stage.committed_md5("plain") == found


def test_what_tells_mlflow_makes_no_other_training(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that is worded anew would cost an unfinished training all its steps."""
    monkeypatch.chdir(project)
    files = ("sdpipe/training/tracking.py", "sdpipe/training/step.py")
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("1\n")
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    Path("dvc.yaml").write_text(f"stages: {{train: {{do: {{deps: [data, {', '.join(files)}]}}}}}}\n")
    md5 = hashlib.md5(b"1\n", usedforsecurity=False).hexdigest()
    deps = ", ".join(f"{{path: {name}, md5: {md5}}}" for name in files)
    outs = "{path: models/constant/weights.safetensors, md5: 5eb6}"
    Path("dvc.lock").write_text(f"stages: {{train@constant: {{deps: [{deps}], outs: [{outs}]}}}}\n")
    before = stage.read_setting("constant")
    assert stage.committed_md5("constant") == "5eb6", "asked for again, it is done again"
    Path(files[0]).write_text("2\n")
    assert stage.read_setting("constant") == before
    assert stage.committed_md5("constant") is None, "its end is taken up"
    Path(files[1]).write_text("2\n")
    assert stage.read_setting("constant") != before


def test_nothing_that_computes_asks_what_tells_mlflow() -> None:
    """Only the session hands over to it, what was computed; and the stage names it."""
    telling = {Path(name) for name in stage.TELLING}
    assert telling <= stage_files("train")
    handing = {path for path in stage_files("train") - telling if our_imports(path) & telling}
    assert handing == {Path("sdpipe/training/session.py")}

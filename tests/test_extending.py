"""A finished run that is asked for more epochs, and what is kept of finished runs."""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import machine, same, train_alone, train_config
from session_runs import results, run_to
from test_training import StopAfter

from sdpipe.data.store import DataSet
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.config import TrainConfig
from sdpipe.training.finished import Lineage
from sdpipe.training.progress import TrainResult
from sdpipe.training.session import train_run


def test_more_epochs_continue_a_finished_run(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bytes of a training that had them from the start; with further milestones, too."""
    run_to(project / "out", dataset, epochs=3, milestones=[2])
    extended = run_to(project / "out", dataset, epochs=5, milestones=[2, 4])
    told = capsys.readouterr().out
    assert "extending the finished training" in told
    assert "continuing after step 18, 3 of 5 epochs" in told
    shutil.rmtree(project / ".sdpipe")
    assert run_to(project / "out", dataset, epochs=5, milestones=[2, 4]) == extended
    assert "continuing" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_went_on_on_another_machine_names_both(
    dataset: DataSet,
    project: Path,
    mlflow_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`train_s` is of both; the last one alone stood beside it."""
    for epochs, name in ((2, "slow"), (3, "fast"), (4, "fast"), (5, "slow"), (6, "slow")):
        monkeypatch.setattr("sdpipe.training.compute.hardware", lambda *_arguments, name=name: name)
        run_to(project / "out", dataset, epochs=epochs, milestones=[])
    assert json.loads((project / "out" / "timing.json").read_text())["hardware"] == "slow, then fast"
    told = capsys.readouterr().out
    assert told.count("on fast, after slow: rounding may be another") == 1
    assert told.count("rounding may be another") == 2  # and not once more where it stays on the slow one


def test_the_longest_finished_run_is_extended(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        run_to(project / "out", dataset, epochs=epochs, milestones=[])
    run_to(project / "out", dataset, epochs=3, milestones=[])
    assert "continuing after step 12, 2 of 3 epochs" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"epochs": 5, "milestones": [1]},
            "its learning rate in epoch 2 was 0.1, params.yaml asks for 0.01",
        ),
        ({"epochs": 2, "milestones": []}, "params.yaml asks for 2"),
    ],
)
def test_what_cannot_be_extended_is_said_and_starts_again(
    project: Path,
    dataset: DataSet,
    mlflow_store: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, object],
    reason: str,
) -> None:
    run_to(project / "out", dataset, epochs=3, milestones=[])
    again = run_to(project / "out", dataset, **overrides)
    told = capsys.readouterr().out
    assert f"of 3 epochs cannot be extended: {reason}" in told
    assert "continuing" not in told
    shutil.rmtree(project / ".sdpipe")
    assert run_to(project / "out", dataset, **overrides) == again


def test_a_finished_run_is_kept_with_all_its_epochs(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a checkpoint is due at the last step of each epoch: it is written behind the validation."""
    often = machine(every_steps=6)
    train_run("plain", train_config(epochs=2, milestones=[]), often, dataset, "code", project / "out")
    train_run("plain", train_config(epochs=3, milestones=[]), often, dataset, "code", project / "out")
    told = capsys.readouterr().out
    assert re.search(r"extending the finished training \w+ of 2 epochs", told)
    assert "continuing after step 12, 2 of 3 epochs" in told


def test_another_training_is_not_extended(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any other key makes another lineage, and what is other is said."""
    run_to(project / "out", dataset, epochs=1, milestones=[])
    assert "another one" not in capsys.readouterr().out
    run_to(project / "out", dataset, epochs=2, milestones=[], weight_decay=2e-4)
    told = capsys.readouterr().out
    assert "extend" not in told
    assert re.search(
        r"run plain: the finished training \w{16} of 6 steps is another one: train.epochs was 1, "
        r"train.weight_decay was 0.0001; starting from the beginning",
        told,
    )


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_a_training_that_dvc_has_is_done_again_when_asked_for(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dvc repro -f` is a test of reproducibility, not a copy, also of a run that extended another."""
    run_to(project / "out", dataset, epochs=1, milestones=[])
    first = run_to(project / "out", dataset, epochs=2, milestones=[])
    committed = md5(project / "out" / "weights.safetensors")
    capsys.readouterr()
    config = train_config(epochs=2, milestones=[])
    train_run("plain", config, machine(), dataset, "code", project / "out", committed_md5=committed)
    assert results(project / "out") == first
    assert "continuing" not in capsys.readouterr().out


@pytest.mark.parametrize("kept", [None, b"\xff93f"])
def test_a_kept_end_whose_digest_is_lost_is_gone_on_from(
    project: Path, dataset: DataSet, mlflow_store: Path, kept: bytes | None
) -> None:
    """As one that DVC does not have: the end is there, and what it is the end of is not known."""
    first = run_to(project / "out", dataset, epochs=1, milestones=[])
    (path,) = (project / ".sdpipe/finished").glob("*/*/weights.md5")
    path.unlink() if kept is None else path.write_bytes(kept)
    committed = md5(project / "out" / "weights.safetensors")
    config = train_config(epochs=1, milestones=[])
    train_run("plain", config, machine(), dataset, "code", project / "out", committed_md5=committed)
    assert results(project / "out") == first


def test_behind_a_damaged_end_a_shorter_one_is_extended(
    project: Path, dataset: DataSet, mlflow_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC does not have the damaged one; the epochs of the one before need not be trained again."""
    for epochs in (1, 2):
        first = run_to(project / "out", dataset, epochs=epochs, milestones=[])
    (damaged,) = (project / ".sdpipe/finished").glob("*/*/step-0000000012/tensors.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert run_to(project / "out", dataset, epochs=2, milestones=[]) == first
    told = capsys.readouterr().out
    assert f"checkpoint {damaged.parent} is damaged and passed over" in told
    assert "continuing after step 6, 1 of 2 epochs" in told


@pytest.mark.slow
@pytest.mark.parametrize("committed", [None, "of-an-older-training"])
def test_a_finished_training_that_dvc_does_not_have_is_not_lost(
    project: Path,
    dataset: DataSet,
    mlflow_store: Path,
    capsys: pytest.CaptureFixture[str],
    committed: str | None,
) -> None:
    """The stage was killed behind the training, or DVC's cache was full."""
    first = run_to(project / "out", dataset, epochs=2, milestones=[])
    shutil.rmtree(project / "out")
    capsys.readouterr()
    config = train_config(epochs=2, milestones=[])
    train_run("plain", config, machine(), dataset, "code", project / "out", committed_md5=committed)
    assert results(project / "out") == first
    assert "continuing after step 12, 2 of 2 epochs" in capsys.readouterr().out


def test_runs_of_one_lineage_may_end_and_begin_together(
    project: Path, dataset: DataSet, mlflow_store: Path
) -> None:
    """Two threads keep and look up finished trainings, some hundred times: no error, none called damaged."""
    config = train_config(epochs=1, milestones=[])
    run_to(project / "out", dataset, epochs=1, milestones=[])
    (folder,) = [path for path in (project / ".sdpipe" / "finished").iterdir() if path.is_dir()]
    (kept,) = [path for path in folder.iterdir() if path.is_dir()]
    source = project / "source"
    shutil.copytree(kept / "step-0000000006", source)

    def keep_again() -> None:
        for _ in range(100):
            unfinished = CheckpointFolder(project / "unfinished", kept.name)
            shutil.copytree(source, unfinished.folder / "step-0000000006")
            Lineage(folder).keep(unfinished, project / "out" / "weights.safetensors")

    def look_up() -> list[str]:
        return [
            sentence
            for _ in range(100)
            for sentence in Lineage(folder).find_start("another", config, None)[1]
            if not sentence.startswith("extending")
        ]

    with ThreadPoolExecutor(2) as pool:
        keeping, looking = pool.submit(keep_again), pool.submit(look_up)
        keeping.result()
        assert looking.result() == []


def test_a_kill_while_an_end_is_replaced_is_no_obstacle(
    project: Path, dataset: DataSet, mlflow_store: Path
) -> None:
    """What was hidden for removal is neither taken for a finished training nor in the way of the next."""
    config = {"epochs": 1, "milestones": []}
    expected = run_to(project / "out", dataset, **config)
    (folder,) = [path for path in (project / ".sdpipe" / "finished").iterdir() if path.is_dir()]
    (kept,) = [path for path in folder.iterdir() if path.is_dir()]
    shutil.copytree(kept, kept.with_name(f".{kept.name}.old.tmp"))
    found, told = Lineage(folder).find_start("another", train_config(**config | {"epochs": 2}), None)
    assert found is not None
    assert told == [f"extending the finished training {kept.name} of 1 epochs"]
    shutil.rmtree(project / "out")
    assert run_to(project / "out", dataset, **config) == expected
    md5 = hashlib.md5((project / "out" / "weights.safetensors").read_bytes(), usedforsecurity=False)
    train_run(  # done again, so that its end replaces the one that is kept
        "plain", train_config(**config), machine(), dataset, "code", project / "out",
        committed_md5=md5.hexdigest(),
    )  # fmt: skip
    assert [path.name for path in folder.iterdir()] == [kept.name]


def keep_and_extend(config: TrainConfig, dataset: DataSet, folder: Path) -> tuple[TrainResult, list[str]]:
    """Finish what is in `folder`, keep its end as a session does, and go on from there with `config`.

    It has had three epochs without a milestone.
    """
    train_alone(config.model_copy(update={"epochs": 3, "milestones": ()}), dataset, folder / "run")
    weights_path = folder / "weights.safetensors"
    weights_path.touch()
    lineage = Lineage(folder / "finished" / "lineage")
    lineage.keep(CheckpointFolder(folder / "run", "0123456789abcdef"), weights_path)
    start, told = lineage.find_start("another", config, None)
    if start is not None:
        CheckpointFolder(folder / "longer", "0123456789abcdef").save(start)
    return train_alone(config, dataset, folder / "longer"), told


# Every one of the 18 steps and 3 validations; the fast ones are about the ends of epochs.
@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [pytest.param(at, marks=() if at in (7, 20, 21) else pytest.mark.slow) for at in range(1, 22)],
)
def test_a_run_that_was_stopped_anywhere_can_be_extended(
    dataset: DataSet, tmp_path: Path, asked: int
) -> None:
    """With a milestone in the new epochs: weights and history are those of a training without a stop."""
    config = train_config(epochs=5, milestones=[3, 4])
    whole = train_alone(config, dataset, tmp_path / "whole")
    with pytest.raises(SystemExit):
        train_alone(train_config(milestones=[]), dataset, tmp_path / "run", interruption=StopAfter(asked))
    extended, (told,) = keep_and_extend(config, dataset, tmp_path)
    assert told == "extending the finished training 0123456789abcdef of 3 epochs"
    assert extended.progress.history == whole.progress.history
    assert same(extended.state, whole.state)


def test_a_run_that_was_stopped_in_its_last_validation_is_refused_another_rate(
    dataset: DataSet, tmp_path: Path
) -> None:
    """Its epoch 3 was trained at 0.1; a milestone behind epoch 2 asks for 0.01 there."""
    with pytest.raises(SystemExit):
        train_alone(train_config(milestones=[]), dataset, tmp_path / "run", interruption=StopAfter(21))
    config = train_config(epochs=5, milestones=[2])
    extended, (told,) = keep_and_extend(config, dataset, tmp_path)
    assert "cannot be extended: its learning rate in epoch 3 was 0.1, params.yaml asks for 0.01" in told
    whole = train_alone(config, dataset, tmp_path / "whole")
    assert extended.progress.history == whole.progress.history
    assert same(extended.state, whole.state)


def test_a_state_within_an_epoch_is_no_end_to_extend(dataset: DataSet, tmp_path: Path) -> None:
    """The rate of its last steps is not known. Such a state is never kept; here it is put there."""
    run = CheckpointFolder(tmp_path / "run", "0123456789abcdef")
    with pytest.raises(SystemExit):
        train_alone(train_config(milestones=[]), dataset, run.folder, interruption=StopAfter(16))
    (tmp_path / "weights").touch()
    lineage = Lineage(tmp_path / "finished" / "lineage")
    lineage.keep(run, tmp_path / "weights")
    start, (told,) = lineage.find_start("another", train_config(epochs=5, milestones=[]), None)
    assert start is None
    assert "cannot be extended: it ends within epoch 3" in told

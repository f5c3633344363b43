"""Runs and tables that are damaged."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_runs import rows_of, two_seeds, write_ensemble, write_run

from sdpipe.cli import main
from sdpipe.errors import DataError
from sdpipe.report.cells import read_table, write_table
from sdpipe.report.write import write_report


def test_a_damaged_run_is_named_and_left_out_and_the_rest_reported(tmp_path: Path) -> None:
    models = tmp_path / "models"
    two_seeds(models)
    other = (models / "c0" / "train.json").read_bytes()
    damage = {
        "half": lambda folder: (folder / "train.json").unlink(),
        "cut": lambda folder: (folder / "weights.safetensors").write_bytes(b"1234"),
        "text": lambda folder: (folder / "history.csv").write_text("epoch,learning_rate\n1,hot\n"),
        "within a number": lambda folder: (folder / "history.csv").write_bytes(
            (folder / "history.csv").read_bytes()[:-2]
        ),
        "short": lambda folder: (folder / "timing.csv").write_text("epoch,epoch_s,images_per_s\n1,2,3\n"),
        "foreign": lambda folder: (folder / "train.json").write_bytes(other),
        "empty": lambda folder: (folder / "timing.json").write_text("{}"),
        "a cell": lambda folder: replaced(folder / "ensemble.csv", ",0.4,0.3", ",0.4"),
        "none": lambda folder: (folder / "train.json").write_text(
            (folder / "train.json").read_text().replace('"test_error": 0.1', '"test_error": "low"')
        ),
    }
    for name, spoil in damage.items():
        run_with_ensemble(models / name)
        spoil(models / name)
    done = CliRunner().invoke(main, ["report", str(models), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(damage)
    for name in damage:
        assert sum(f"models/{name}" in line for line in lines) == 1, name
    assert [row["run"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["c0", "c1", "s0", "s1"]
    assert "models/half" in (tmp_path / "out" / "index.html").read_text()


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "key"),
    [
        (
            "train.json",
            '"test_error": 0.1',
            '"test_error": -5',
            "test_error: expected a number from 0 to 1, got -5",
        ),
        (
            "train.json",
            '"test_error": 0.1',
            '"test_error": 10.5',
            "test_error: expected a number from 0 to 1",
        ),
        (
            "train.json",
            '"num_train": 9000',
            '"num_train": NaN',
            "num_train: expected a number from 0, got nan",
        ),
        (
            "train.json",
            '"num_train": 9000',
            f'"num_train": 1{"0" * 400}',
            "num_train: expected a number from 0",
        ),
        ("timing.json", '"train_s": 30.0', '"train_s": -1', "train_s: expected a number over 0, got -1"),
        ("timing.json", '"train_s": 30.0', '"train_s": 0.0', "train_s: expected a number over 0, got 0"),
        ("history.csv", ",0.25,", ",nan,", "validation_error: expected a number from 0 to 1, got nan"),
        ("history.csv", "2,0.1,1.0", "2,0.1,inf", "train_loss: expected a number from 0, got inf"),
        ("timing.csv", "10.0", "-10.0", "epoch_s: expected a number from 0, got -10"),
        ("ensemble.csv", "0.12", "nan", "ensemble_error: expected a number from 0 to 1, got nan"),
        ("ensemble.csv", ",4,", ",0,", "members: expected a number over 0, got 0"),
    ],
)
def test_a_number_that_cannot_be_is_named_with_its_file(
    tmp_path: Path, name: str, old: str, new: str, key: str
) -> None:
    """The run is left out, as every damaged one."""
    folder = run_with_ensemble(tmp_path / "models" / "odd")
    write_run(tmp_path / "models" / "good", seed=1)
    replaced(folder / name, old, new)
    (problem,) = write_report([tmp_path / "models"], tmp_path / "out")
    assert problem.startswith(f"{folder / name}: {key}")
    assert [row["run"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["good"]


def rows_changed(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    """The same change in both tables of a run."""
    for name in ("history.csv", "timing.csv"):
        header, *rows = (folder / name).read_text().splitlines()
        (folder / name).write_text("\n".join([header, *change(rows)]) + "\n")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda folder: replaced(folder / "train.json", '"best_epoch": 2', '"best_epoch": 3'),
            "its history has no epoch 3 with the validation error 0.25, which was kept",
        ),
        (
            lambda folder: replaced(folder / "train.json", '_error": 0.25', '_error": 0.375'),
            "its history has no epoch 2 with the validation error 0.375, which was kept",
        ),
        (
            lambda folder: rows_changed(folder, lambda rows: rows[:-1]),
            "history.csv ends at another epoch than the 3 of train.json",
        ),
        (
            lambda folder: rows_changed(folder, lambda rows: [rows[0], *rows]),
            "its history: expected each epoch once and in order, got [1, 1, 2, 3]",
        ),
    ],
    ids=["another-epoch", "another-error", "both-cut", "both-twice"],
)
def test_a_history_that_is_not_the_runs_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], problem: str
) -> None:
    """Whole in itself, but not what train.json tells of; the run is left out."""
    write_run(tmp_path / "models" / "odd")
    write_run(tmp_path / "models" / "good", seed=1)
    spoil(tmp_path / "models" / "odd")
    assert write_report([tmp_path / "models"], tmp_path / "out") == [
        f"{tmp_path / 'models' / 'odd'}: {problem}"
    ]
    assert [row["run"] for row in rows_of(tmp_path / "out" / "runs.csv")] == ["good"]


def run_with_ensemble(folder: Path) -> Path:
    write_ensemble(folder, write_run(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "key"),
    [
        ("runs.csv", ",0.1,0.25,", ",-5,0.25,", "test_error: expected a number from 0 to 1, got -5"),
        ("history.csv", ",0.25,", ",NaN,", "validation_error: expected a number from 0 to 1, got nan"),
        ("ensemble.csv", "0.12", "NaN", "ensemble_error: expected a number from 0 to 1, got nan"),
    ],
)
def test_a_number_that_cannot_be_is_named_in_a_report_too(
    tmp_path: Path, name: str, old: str, new: str, key: str
) -> None:
    run_with_ensemble(tmp_path / "models" / "odd")
    write_run(tmp_path / "good", seed=1)
    write_report([tmp_path / "models"], tmp_path / "out")
    replaced(tmp_path / "out" / name, old, new)
    (problem,) = write_report([tmp_path / "out", tmp_path / "good"], tmp_path / "again")
    assert problem.startswith(f"{tmp_path / 'out' / name}: odd: {key}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("flip", '"no way"', "flip: expected a valid boolean, unable to interpret input, got 'no way'"),
        ("dropout", "none", "dropout: expected a valid number"),
        ("skip", "3", "skip: expected 'A', 'B', 'C' or 'plain', got 3"),
        ("depth", "20.5", "depth: expected a valid integer"),
        ("family", "", "its params hold no family"),
        ("image_size", "5", "image_size: expected"),
        ("git_commit", "12345678", "git_commit: expected a valid string, got 12345678"),
        ("train_s", "soon", "train_s: expected a number, got 'soon'"),
        ("train_s", "FALSE", "train_s: expected a number, got 'False'"),
        ("best_epoch", '"2"', "best_epoch: expected a number, got '2'"),
        ("num_train", '"9000"', "num_train: expected a number, got '9000'"),
        ("test_error", "TRUE", "test_error: expected a number, got 'True'"),
        ("widths", "null", "widths: expected a valid tuple"),
        ("widths", "7", "widths: expected a valid tuple"),
        ("crop", "{}", "crop: expected a number, a word or a list of them, got {}"),
        ("lighting", '[{"a": 1}]', "lighting: expected a number, a word or a list of them, got [{'a': 1}]"),
        ("hardware", "7", "hardware: expected a valid string"),
        pytest.param("depth", "[" * 100_000, "depth: expected a valid integer", id="brackets"),
    ],
)
def test_a_value_of_another_type_in_a_reports_table_is_named(
    tmp_path: Path, column: str, value: str, says: str
) -> None:
    write_run(tmp_path / "models" / "a")
    write_run(tmp_path / "models" / "b", seed=1)
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = rows_of(table := tmp_path / "out" / "runs.csv")
    rows[0][column] = value
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (problem,) = write_report([tmp_path / "out"], tmp_path / "again")
    assert problem.startswith(f"{table}: a: {says}")
    assert [row["run"] for row in rows_of(tmp_path / "again" / "runs.csv")] == ["b"]


@pytest.mark.parametrize("crops", [(None, {"shorter_side": [9, 12]}), ({"shorter_side": [9, 12]}, None)])
def test_a_key_with_a_value_and_keys_below_it_is_named(tmp_path: Path, crops: tuple[object, object]) -> None:
    """Which ended the whole report, or passed for the value, by the order of the columns."""
    for name, crop in zip(("a", "b"), crops, strict=True):
        write_run(tmp_path / "models" / name, crop=crop)
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = read_table(table := tmp_path / "out" / "runs.csv")
    write_table(table, [rows[0], {**rows[1], "crop": None, "crop.shorter_side": [9, 12]}], rows[0])
    (problem,) = write_report([tmp_path / "out"], tmp_path / "again")
    assert problem == f"{table}: b: crop: expected it or crop.shorter_side, found both"


@pytest.mark.parametrize("fact", [("num_train", None), ("test_error", True), ("test_error", "0.5")])
def test_a_fact_that_is_no_number_leaves_the_run_out(tmp_path: Path, fact: tuple[str, object]) -> None:
    """Not the whole report; nor does true count as an error of 100 %."""
    write_run(tmp_path / "models" / "good")
    write_run(tmp_path / "models" / "bad", seed=1)
    path = tmp_path / "models" / "bad" / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict([fact])))
    (problem,) = write_report([tmp_path / "models"], tmp_path / "out")
    assert problem == f"{path}: {fact[0]}: expected a number, got {str(fact[1])!r}"


@pytest.mark.slow
@pytest.mark.parametrize("column", ["run", "hardware", "dataset"])
def test_a_text_with_half_a_character_in_it_is_named(tmp_path: Path, column: str) -> None:
    """Such as JSON can spell and no file can hold; the first table ended in a traceback."""
    write_run(tmp_path / "models" / "a")
    write_run(tmp_path / "models" / "b", seed=1)
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = rows_of(table := tmp_path / "out" / "runs.csv")
    rows[0][column] = '"a\\ud800"'
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (problem,) = write_report([tmp_path / "out"], tmp_path / "again")
    assert f"{column}: expected text, got half a character in" in problem
    assert [row["run"] for row in rows_of(tmp_path / "again" / "runs.csv")] == ["b"]


def test_a_table_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    """With a mark at its start, and names of runs that are numbers."""
    write_run(tmp_path / "models" / "7")
    write_run(tmp_path / "models" / "abc", seed=1)
    write_report([tmp_path / "models"], tmp_path / "out")
    for name in ("runs.csv", "history.csv"):
        table = tmp_path / "out" / name
        table.write_text(table.read_text().replace('"""7"""', "7"), encoding="utf-8-sig")
    assert write_report([tmp_path / "out"], tmp_path / "again") == []
    assert [row["run"] for row in rows_of(tmp_path / "again" / "runs.csv")] == ['"7"', "abc"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "history.csv: is empty"),
        (b"epoch\n1", "history.csv: the last line is cut short"),
        (b"epoch,loss\n1", "history.csv: the last line is cut short"),
        (b"epoch,loss\n1,2\n3\n", "history.csv: row 2 has another number of cells than the header"),
        (b"epoch\n1,2\n", "history.csv: row 1 has another number of cells than the header"),
    ],
)
def test_a_damaged_history_is_told_in_words(tmp_path: Path, content: bytes, says: str) -> None:
    write_run(tmp_path / "models" / "good")
    write_run(tmp_path / "models" / "odd", seed=1)
    (tmp_path / "models" / "odd" / "history.csv").write_bytes(content)
    assert write_report([tmp_path / "models"], tmp_path / "out") == [f"{tmp_path}/models/odd/{says}"]


def test_a_history_of_nothing_but_zeros_and_a_name_that_is_no_text_are_lines(tmp_path: Path) -> None:
    """A file system that lost power leaves the first; the second must not end the page behind all work."""
    write_run(tmp_path / "models" / "good")
    write_run(tmp_path / "models" / "lost", seed=1)
    (tmp_path / "models" / "lost" / "history.csv").write_bytes(b"epoch\n" + b"\0" * 200_000)
    bad = tmp_path / "bad\udcff"
    problems = write_report([tmp_path / "models", bad], tmp_path / "out")
    assert [problem.split(": ")[0] for problem in problems] == [
        str(tmp_path / "models" / "lost" / "history.csv"),
        f"{tmp_path}/bad\\udcff",
    ]
    assert "bad\\udcff" in (tmp_path / "out" / "index.html").read_text()


def test_no_run_at_all_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(DataError, match=r"no finished run: looked for RUN/weights\.safetensors.*models"):
        write_report([tmp_path / "models"], tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""`sdpipe report`: runs in, tables, figures and one page out."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import FULL, rows_of, two_seeds, write_ensemble, write_run

from sdpipe.cli import main
from sdpipe.errors import DataError, ModelError
from sdpipe.recipes import load_recipes
from sdpipe.report.cells import read_table, write_table
from sdpipe.report.figures import plan_figures
from sdpipe.report.html_tables import duration
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import group
from sdpipe.report.write import write_report
from sdpipe.training.records import record_from_files
from sdpipe.training.weights import load_info, load_weights


def test_tables_hold_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    two_seeds(tmp_path / "models")
    assert write_report([tmp_path / "models"], tmp_path / "out") == []
    (row,) = rows_of(tmp_path / "out" / "table1.csv")
    assert (row["n_constant"], row["n_compared"]) == ("2", "2")
    # sd of 0.1 and 0.2: sqrt(2 * 0.05^2 / 1) = 0.0707107; of 0.30 and 0.32: sqrt(2 * 0.01^2) = 0.0141421
    expected = {"constant_error_mean": 0.15, "constant_error_sd": 0.0707107, "compared_error_mean": 0.31}
    expected |= {"compared_error_sd": 0.0141421, "difference": 0.16}
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, abs=1e-6), name
    assert row["verdict"] == "stochastic is worse"
    (row,) = rows_of(tmp_path / "out" / "table2.csv")
    # three validations each: 30 s and 33 s, mean 31.5, sd sqrt(2 * 1.5^2) = 2.12132; 1 - 24 / 31.5 = 0.238095
    expected = {
        "constant_s_mean": 31.5,
        "constant_s_sd": 2.12132,
        "compared_s_mean": 24,
        "saving": 0.238095,
    }
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, abs=1e-5), name
    assert "warning" not in row


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "c", p_L=1.0, test_error=0.2)
    write_run(tmp_path / "models" / "s", p_L=0.5, test_error=0.1)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert "constant_error_sd" not in row
    assert "compared_error_sd" not in row
    assert row["verdict"] == "stochastic is better; one run tells no spread"


def test_equal_errors_are_equal_whatever_their_number(tmp_path: Path) -> None:
    """Three times 0.1 have the mean 0.10000000000000002, twice 0.1 have 0.1: none is better for that."""
    for seed in range(3):
        write_run(tmp_path / "models" / f"c{seed}", p_L=1.0, test_error=0.1, seed=seed)
    for seed in range(2):
        write_run(tmp_path / "models" / f"s{seed}", p_L=0.5, test_error=0.1, seed=seed)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert (row["difference"], row["verdict"]) == (0, "equal")
    assert "+0.00" in (tmp_path / "out" / "index.html").read_text()


def test_a_report_of_a_report_is_the_same(tmp_path: Path) -> None:
    """Every byte, also with an ensemble, validations within an epoch, and params that are mappings."""
    models = tmp_path / "models"
    two_seeds(models)
    write_ensemble(models / "s0", write_run(models / "s0", p_L=0.5, test_error=0.3))
    write_run(models / "svhn", p_L=0.5, validated_at=(0.5, 1, 1.5), validation={"train": 4, "extra": 2})
    write_report([models], tmp_path / "one")
    write_report([tmp_path / "one"], tmp_path / "two")
    write_report([models, tmp_path / "two"], tmp_path / "mixed")  # each fingerprint counts once
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for other in ("two", "mixed"):
        assert {path.name: path.read_bytes() for path in (tmp_path / other).iterdir()} == first, other
    assert {"index.html", "runs.csv", "history.csv", "ensemble.csv", "table1.csv", "table2.csv"} <= set(first)


def test_runs_csv_has_the_facts_and_all_params_flat(tmp_path: Path) -> None:
    fingerprint = write_run(tmp_path / "models" / "s", p_L=0.5, weight_decay=1e-4)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out" / "runs.csv")
    expected = {"run": "s", "fingerprint": fingerprint, "test_error": "0.1", "validation_error": "0.25"}
    expected |= {"num_train": "9000", "expected_depth": "2.0", "train_s": "30.0", "warmup.epochs": "0"}
    expected |= {
        "hardware": "a machine, 2 cores",
        "recipe": "",
        "full_size": "false",
        "weight_decay": "0.0001",
    }
    assert {name: row[name] for name in expected} == expected


def test_validations_within_an_epoch_keep_their_places(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "s", validated_at=(0.25, 0.5, 0.75))
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "history.csv")
    assert [row["epoch"] for row in rows] == ["0.25", "0.5", "0.75"]
    assert {row["epoch_s"] for row in rows} == {"10"}
    assert rows_of(tmp_path / "out" / "runs.csv")[0]["best_epoch"] == "0.5"


def test_a_damaged_run_is_named_and_left_out_and_the_rest_reported(tmp_path: Path) -> None:
    models = tmp_path / "models"
    two_seeds(models)
    other = (models / "c0" / "train.json").read_bytes()
    damage = {
        "half": lambda folder: (folder / "train.json").unlink(),
        "cut": lambda folder: (folder / "weights.safetensors").write_bytes(b"1234"),
        "text": lambda folder: (folder / "history.csv").write_text("epoch,learning_rate\n1,hot\n"),
        "short": lambda folder: (folder / "timing.csv").write_text("epoch,epoch_s,images_per_s\n1,2,3\n"),
        "foreign": lambda folder: (folder / "train.json").write_bytes(other),
        "empty": lambda folder: (folder / "timing.json").write_text("{}"),
        "none": lambda folder: (folder / "train.json").write_text(
            (folder / "train.json").read_text().replace('"test_error": 0.1', '"test_error": "low"')
        ),
    }
    for name, spoil in damage.items():
        write_run(models / name)
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


def run_with_ensemble(folder: Path) -> Path:
    write_ensemble(folder, write_run(folder))
    return folder


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


def test_no_run_at_all_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(DataError, match=r"no finished run: looked for RUN/weights\.safetensors.*models"):
        write_report([tmp_path / "models"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_reports_folder_is_replaced(tmp_path: Path) -> None:
    """All of it must be a report's: neither runs nor a note beside a report are lost."""
    models, out = tmp_path / "models", tmp_path / "out"
    write_run(models / "a")
    with pytest.raises(DataError, match="no report wrote a;"):
        write_report([models], models)
    out.mkdir()
    write_report([models], out)
    write_run(models / "b", p_L=1.0, depth=26)
    write_report([models], out)
    assert len(rows_of(out / "runs.csv")) == 2
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"no report wrote notes\.txt"):
        write_report([models], out)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    write_report([out], out)  # redrawn in its place
    assert len(rows_of(out / "runs.csv")) == 2


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_the_page_needs_nothing_but_itself_and_escapes_names(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "<script>alert(1)</script>".replace("/", "_"), hardware='<img src="x">')
    write_run(tmp_path / "models" / "<b>a&b", p_L=1.0)
    write_report([tmp_path / "models"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    parser = Tags()
    parser.feed(page)
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in parser.found}
    sources = [value for _, values in parser.found for name, value in values if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(", page)
    assert {"<b>a&b", "<script>alert(1)<_script>", '<img src="x">'} <= set(parser.cells)


def drawn(models: Path) -> set[str]:
    return {drawing.number for drawing in plan_figures(group(read_runs([models])[0]))[0]}


def test_each_figure_is_drawn_once_the_runs_suffice(tmp_path: Path) -> None:
    write_run(tmp_path / "c", p_L=1.0)
    assert drawn(tmp_path) == {"As figure 3"}
    fingerprint = write_run(tmp_path / "s", p_L=0.5)
    assert drawn(tmp_path) == {"As figure 3", "Figure 7"}
    write_run(tmp_path / "s8", p_L=0.8)
    assert drawn(tmp_path) == {"As figure 3", "Figure 7", "Figure 8 left"}
    write_run(tmp_path / "c26", p_L=1.0, depth=26)
    expected = {"As figure 3", "Figure 7", "Figure 8 left", "Figure 8 right"}
    assert drawn(tmp_path) == expected
    write_run(tmp_path / "s26", p_L=0.5, depth=26)
    assert drawn(tmp_path) == (expected := expected | {"Figure 5"})
    write_run(tmp_path / "p", p_L=1.0, skip="plain")
    assert drawn(tmp_path) == expected
    write_run(tmp_path / "p26", p_L=1.0, skip="plain", depth=26)
    assert drawn(tmp_path) == (expected := expected | {"Degradation"})
    write_ensemble(tmp_path / "s", fingerprint)
    assert drawn(tmp_path) == (expected := expected | {"Ensemble"})
    write_run(tmp_path / "cifar", dataset="cifar10")
    write_run(tmp_path / "svhn", dataset="svhn")
    write_run(tmp_path / "imagenet", family="imagenet", depth=18, widths=[4, 4, 8, 8])
    assert drawn(tmp_path) == expected | {"Figure 3", "Figure 4", "Figure 6"}
    write_report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Not drawn" not in page
    assert page.count("the paper's figures show the test error".replace("'", "&#x27;")) == page.count(
        "curves-"
    )
    depths = [row["depth"] for row in rows_of(tmp_path / "out" / "degradation.csv")]
    assert sorted(depths) == ["20", "20", "26", "26"]


def test_what_is_not_drawn_is_listed_with_the_command_that_makes_it(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "s", p_L=0.5)
    write_report([tmp_path / "models"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text().partition("Not drawn")[2]
    for name in (
        "Figure 3",
        "Figure 4",
        "Figure 5",
        "Figure 6",
        "Figure 7",
        "Figure 8 left",
        "Figure 8 right",
    ):
        assert f"<strong>{name}</strong>" in page
    assert "sdpipe recipe use figure8-left-small" in page
    assert "sdpipe ensemble" in page


def test_every_recipe_named_beside_a_figure_makes_it(tmp_path: Path) -> None:
    """By its runs alone; the page named some of which the figure was still not drawn."""
    write_run(tmp_path / "other" / "s", p_L=0.5)
    _, not_drawn = plan_figures(group(read_runs([tmp_path / "other"])[0]))
    wanted: dict[str, set[str]] = {}
    for figure in not_drawn:
        for command in figure.commands:
            wanted.setdefault(command.removeprefix("sdpipe recipe use "), set()).add(figure.number)
    assert wanted.pop("sdpipe ensemble models/RUN") == {"Ensemble"}
    assert set.union(*wanted.values()) == {figure.number for figure in not_drawn} - {"Ensemble"}
    for name, figures in wanted.items():
        recipe = load_recipes()[name]
        for run, overrides in recipe.runs.items():
            write_run(tmp_path / name / run, **{**recipe.train, **overrides})
        drawings, _ = plan_figures(group(read_runs([tmp_path / name])[0]))
        assert figures <= {drawing.number for drawing in drawings}, name


def test_figure_5_compares_the_papers_110_and_1202_layers_whose_schedules_differ(tmp_path: Path) -> None:
    deep = FULL | {"depth": 1202, "epochs": 300, "milestones": [150, 225]}
    deep |= {"warmup": {"epochs": 10, "learning_rate": 0.01}}
    for name, params in (("110", FULL), ("1202", deep)):
        write_run(tmp_path / f"c{name}", p_L=1.0, **params)
        write_run(tmp_path / f"s{name}", p_L=0.5, **params)
    (bars,) = [one for one in plan_figures(group(read_runs([tmp_path])[0]))[0] if one.number == "Figure 5"]
    assert "110 and 1202 layers" in bars.title
    assert bars.mark == ""


def test_rows_of_an_earlier_training_in_ensemble_csv_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "s"
    write_ensemble(folder, write_run(folder))
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "ensemble.csv")
    assert [(row["run"], row["members"]) for row in rows] == [("s", "1"), ("s", "4")] * 2
    assert all(float(row["ensemble_error"]) < 0.5 for row in rows)


def test_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    prints = [write_run(tmp_path / name / "run", seed=seed) for seed, name in enumerate(("a", "b"))]
    runs, _ = read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a" / "run"])
    assert sorted(run.run for run in runs) == sorted(f"run~{found[:8]}" for found in prints)


@pytest.mark.parametrize(
    "value",
    ["", "text", "1", "12e3", "true", "null", '"', "a,b\n'c'", "NaN", 1, 1.0, 1e-4, True, None, [1, 2.5]],
)
def test_cells_read_back_as_they_were(tmp_path: Path, value: Any) -> None:
    """A fingerprint of digits stays text, 1.0 a float and 1 a whole number."""
    write_table(tmp_path / "t.csv", [{"a": value, "b": 0}, {"b": 0}])
    first, second = read_table(tmp_path / "t.csv")
    assert (first["a"], type(first["a"])) == (value, type(value))
    assert "a" not in second


def test_not_a_number_reads_back(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"a": math.nan}])
    assert math.isnan(read_table(tmp_path / "t.csv")[0]["a"])


def test_load_info_is_what_load_weights_reads(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "weights.safetensors"
    assert load_info(path) == load_weights(path).info
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a readable weights file"):
        load_info(path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (845, "14 min 05 s"),
        (3599.7, "1 h 00 min"),
        (74520, "20 h 42 min"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("folder", [".", "../run", "./"])
def test_a_run_has_the_name_of_its_folder_from_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """In the report and, by the record of it, in MLflow."""
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    ((run,), _) = read_runs([Path(folder)])
    assert (run.run, record_from_files(Path(folder)).name) == ("run", "run")

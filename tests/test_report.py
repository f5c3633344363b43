"""`sdpipe report`: runs in, tables, figures and one page out."""

import csv
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from report_runs import FULL, write_ensemble, write_run

from sdpipe.cli import main
from sdpipe.errors import DataError, ModelError
from sdpipe.recipes import load_recipes
from sdpipe.report.cells import read_table, write_table
from sdpipe.report.figures import plan_figures
from sdpipe.report.html_tables import duration
from sdpipe.report.plots import Sheet
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import group
from sdpipe.report.write import write_report
from sdpipe.training.weights import load_info, load_weights

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def rows_of(path: Path) -> list[dict[str, str]]:
    """By Python's own reader, empty cells as ''."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def two_seeds(models: Path, **overrides: Any) -> None:
    """Constant 0.10 and 0.20 in 30 s and 33 s, stochastic 0.30 and 0.32 in 24 s and 24 s."""
    for seed, (constant, seconds, stochastic) in enumerate([(0.10, 10.0, 0.30), (0.20, 11.0, 0.32)]):
        write_run(models / f"c{seed}", test_error=constant, epoch_s=seconds, p_L=1.0, seed=seed, **overrides)
        write_run(models / f"s{seed}", test_error=stochastic, epoch_s=8.0, p_L=0.5, seed=seed, **overrides)


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


@pytest.mark.parametrize(
    "differing", [{"weight_decay": 1e-3}, {"digest": "e" * 64}, {"depth": 26}, {"flip": False}]
)
def test_other_trainings_are_another_setting(tmp_path: Path, differing: dict[str, Any]) -> None:
    """And carry a name of their own."""
    write_run(tmp_path / "a", p_L=1.0)
    write_run(tmp_path / "b", p_L=0.5, **differing)
    settings = group(read_runs([tmp_path])[0])
    assert len({setting.label for setting in settings}) == 2
    assert [len(setting.runs) for setting in settings] == [1, 1]


def test_settings_that_differ_in_nearly_everything_still_fit_into_file_names(tmp_path: Path) -> None:
    other = {
        "validation": 0.3,
        "dropout": 0.125,
        "batch_size": 32,
        "learning_rate": 0.0625,
        "drop_factor": 3.0,
    }
    other |= {
        "warmup": {"epochs": 1, "learning_rate": 0.001},
        "momentum": 0.8125,
        "weight_decay": 0.00048828125,
    }
    write_run(tmp_path / "models" / "a")
    write_run(tmp_path / "models" / "b", milestones=[1, 2], widths=[8, 16, 16], digest="e" * 64, **other)
    write_report([tmp_path / "models"], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("curves-*.png"))) == 2


def test_seed_p_L_rule_draw_and_how_it_is_computed_are_one_setting(tmp_path: Path) -> None:
    write_run(tmp_path / "a", p_L=1.0)
    write_run(tmp_path / "b", p_L=1.0, seed=1, rule="uniform", precision="bf16", micro_batches=2)
    write_run(tmp_path / "c", p_L=0.8, rule="uniform", device="cuda")
    write_run(tmp_path / "d", p_L=0.5, draw="sample", compile=True)
    write_run(tmp_path / "e", p_L=0.5)
    (setting,) = group(read_runs([tmp_path])[0])
    assert setting.constant is not None
    assert [run.run for run in setting.constant.runs] == ["a", "b"]
    assert [arm.runs[0].run for arm in setting.stochastic] == ["e", "d", "c"]  # most like the paper's first


def test_reduced_size_is_marked_wherever_it_shows(tmp_path: Path) -> None:
    """In every row, every caption and every picture; the paper's numbers stand apart from it."""
    two_seeds(tmp_path / "models", dataset="cifar10")
    write_report([tmp_path / "models"], tmp_path / "out")
    mark = "reduced size: 20 layers, cifar10, 9,000 images of 9 x 9 pixels, 3 epochs"
    for table in ("table1.csv", "table2.csv"):
        for row in rows_of(tmp_path / "out" / table):
            assert (row["full_size"], row["mark"]) == ("false", mark)
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert (row["paper_recipe"], row["paper_constant_error"]) == ("cifar10", 0.0641)
    assert row["paper_context"] == "110 layers, 500 epochs, p_L 0.5"
    page = (tmp_path / "out" / "index.html").read_text()
    captions = re.findall("<figcaption>.*?</figcaption>", page)
    assert captions
    assert all("Reduced size: 20 layers" in caption for caption in captions)
    drawings, _ = plan_figures(group(read_runs([tmp_path / "models"])[0]))
    for drawing in drawings:
        drawing.draw(Sheet(path=tmp_path / "unmarked.png", title=drawing.title, mark=""))
        marked = (tmp_path / "out" / f"{drawing.name}.png").read_bytes()
        assert marked != (tmp_path / "unmarked.png").read_bytes(), drawing.name


def test_full_size_runs_stand_beside_the_papers_numbers(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "c", p_L=1.0, **FULL)
    write_run(tmp_path / "models" / "s", p_L=0.5, **FULL)
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert (row["full_size"], row["paper_recipe"]) == (True, "cifar10")
    assert "mark" not in row or row["mark"] == ""
    (row,) = read_table(tmp_path / "out" / "table2.csv")
    # 20 h 42 and 15 h 07
    assert (row["paper_constant_s"], row["paper_stochastic_s"]) == (74520, 54420)
    assert "educed size:" not in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize("unlike", [{"num_train": 44_999}, {"image_size": (9, 9)}, {"epochs": 501}])
def test_fewer_or_smaller_images_are_not_full_size(tmp_path: Path, unlike: dict[str, Any]) -> None:
    """Although the params are the recipe's."""
    write_run(tmp_path / "c", p_L=1.0, **{**FULL, **unlike})
    (run,), _ = read_runs([tmp_path])
    assert run.recipe is None


@pytest.mark.parametrize(
    ("unlike", "context"),
    [
        ({}, None),
        ({"p_L": 0.35}, "110 layers, 500 epochs, p_L 0.5"),
        ({"rule": "uniform"}, "110 layers, 500 epochs, p_L 0.5"),
        ({"draw": "sample"}, "110 layers, 500 epochs, p_L 0.5"),
        ({"dropout": 0.2, "p_L": 1.0}, "110 layers, 500 epochs, p_L 0.5"),
        ({"depth": 20}, "110 layers, 500 epochs, p_L 0.5"),
    ],
)
def test_the_papers_numbers_say_of_what_they_are_unless_of_this_training(
    tmp_path: Path, unlike: dict[str, Any], context: str | None
) -> None:
    """All of these are runs of recipes, of full size; the paper has errors and times of the first only."""
    shared = {"depth": unlike.get("depth", 110)}
    write_run(tmp_path / "models" / "c", **{**FULL, **shared, "p_L": 1.0})
    write_run(tmp_path / "models" / "s", **{**FULL, "p_L": 0.5, **unlike})
    write_report([tmp_path / "models"], tmp_path / "out")
    for table in ("table1.csv", "table2.csv"):
        (row,) = read_table(tmp_path / "out" / table)
        assert (row["full_size"], row["paper_recipe"]) == (True, "cifar10"), table
        assert row.get("paper_context") == context, table
    page = (tmp_path / "out" / "index.html").read_text()
    assert ("6.41 → 5.25 (cifar10)" in page) == (context is None)
    assert (f"6.41 → 5.25 (cifar10; context: {context})" in page) == (context is not None)


@pytest.mark.parametrize(("epochs", "errors"), [(90, (0.2306, 0.2338)), (120, (0.2178, 0.2198))])
def test_imagenet_stands_beside_the_papers_numbers_after_90_and_120_epochs(
    tmp_path: Path, epochs: int, errors: tuple[float, float]
) -> None:
    params = {**load_recipes()["imagenet"].train, "epochs": epochs}
    size = {"num_train": 1_271_167, "image_size": (224, 224)}
    write_run(tmp_path / "models" / "c", **{**params, **size, "p_L": 1.0})
    write_run(tmp_path / "models" / "s", **{**params, **size, "p_L": 0.5})
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table1.csv")
    assert (row["full_size"], row["paper_recipe"]) == (True, "imagenet")
    assert (row["paper_constant_error"], row["paper_stochastic_error"]) == errors
    assert "paper_context" not in row


def test_cifar100_shows_table_1_and_the_text(tmp_path: Path) -> None:
    """27.76 and 27.22 are both the paper's."""
    write_run(tmp_path / "models" / "c", p_L=1.0, **{**FULL, "dataset": "cifar100"})
    write_report([tmp_path / "models"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "27.76 (text 27.22) → 24.98 (cifar100)" in page


def test_dropout_is_compared_with_constant_depth(tmp_path: Path) -> None:
    """One setting of three trainings, as the recipe `dropout` makes them, in the table and in the curves."""
    for name, overrides in load_recipes()["dropout"].runs.items():
        error = {"stochastic": 0.1, "constant": 0.12, "dropout": 0.125}[name]
        write_run(tmp_path / "models" / name, test_error=error, **overrides)
    (setting,) = group(read_runs([tmp_path / "models"])[0])
    names = ["constant depth", "stochastic, p_L 0.5", "constant depth, dropout 0.2"]
    assert [arm.name for arm in setting.arms] == names
    write_report([tmp_path / "models"], tmp_path / "out")
    first, second = read_table(tmp_path / "out" / "table1.csv")
    assert (first["p_L"], first["dropout"], second["p_L"], second["dropout"]) == (0.5, 0.0, 1.0, 0.2)
    assert second["difference"] == pytest.approx(0.005)
    assert second["verdict"] == "dropout is worse; one run tells no spread"
    (curves,) = [one for one in plan_figures([setting])[0] if one.number == "As figure 3"]
    errors = curves.draw(Sheet(path=tmp_path / "curves.png", title="", mark="")).axes[0]
    assert [label for label in errors.get_legend_handles_labels()[1] if "lowest" not in label] == names
    assert "constant depth, dropout 0.2" in (tmp_path / "out" / "index.html").read_text()


def test_dropout_in_all_runs_is_no_comparison_of_it(tmp_path: Path) -> None:
    write_run(tmp_path / "c", p_L=1.0, dropout=0.1)
    write_run(tmp_path / "s", p_L=0.5, dropout=0.1)
    (setting,) = group(read_runs([tmp_path])[0])
    assert setting.constant is not None
    assert setting.constant.name == "constant depth, dropout 0.1"
    assert [arm.name for arm in setting.compared] == ["stochastic, p_L 0.5, dropout 0.1"]


def test_runs_of_an_older_report_are_of_one_setting_with_those_of_today(tmp_path: Path) -> None:
    """What its params do not name was not there to be chosen, so the value of before is meant."""
    write_run(tmp_path / "models" / "c", p_L=1.0)
    write_report([tmp_path / "models"], tmp_path / "old")
    later = {"p_L_warmup_epochs", "validate_steps", "plateau_epochs", "normalisation", "crop"}
    later |= {"colour_jitter", "lighting", "recompute", "image_size"}
    rows = read_table(tmp_path / "old" / "runs.csv")
    assert later <= set(rows[0])
    write_table(
        tmp_path / "old" / "runs.csv",
        [{key: value for key, value in row.items() if key not in later} for row in rows],
    )
    write_run(tmp_path / "new" / "s", p_L=0.5)
    (setting,) = group(read_runs([tmp_path / "old", tmp_path / "new"])[0])
    assert [run.run for run in setting.runs] == ["c", "s"]


def test_cifar10_pictures_in_folders_are_told_by_their_classes(tmp_path: Path) -> None:
    """So that the paper's numbers stand beside them; other pictures get none."""
    write_run(tmp_path / "a", dataset="imagefolder", class_names=CIFAR10, image_size=(32, 32))
    write_run(tmp_path / "b", dataset="imagefolder", digest="e" * 64)
    write_report([tmp_path], tmp_path / "out")
    first, second = read_table(tmp_path / "out" / "table1.csv")
    assert (first["setting"], first["paper_recipe"]) == (
        "imagefolder (cifar10 classes), 20 layers",
        "cifar10",
    )
    assert "paper_recipe" not in second


def test_different_hardware_is_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path / "models" / "c", p_L=1.0, hardware="fast")
    write_run(tmp_path / "models" / "s", p_L=0.5, hardware="slow")
    write_report([tmp_path / "models"], tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table2.csv")
    assert "different hardware" in row["warning"]
    assert "different hardware" in (tmp_path / "out" / "index.html").read_text()


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

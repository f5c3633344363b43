"""Which runs a report takes as one setting, and what it compares with the papers' numbers."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_runs import FULL, rows_of, two_seeds, write_run

from sdpipe.recipes import load_recipes
from sdpipe.report.cells import read_table, write_table
from sdpipe.report.figures import plan_figures
from sdpipe.report.plots import Sheet
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import group, size_mark
from sdpipe.report.write import write_report

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
    other = {"validation": 0.3, "dropout": 0.125, "batch_size": 32, "learning_rate": 0.0625}
    other |= {"drop_factor": 3.0}
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
    write_run(tmp_path / "b", p_L=1.0, seed=1, rule="uniform", precision="bf16", recompute=True)
    write_run(tmp_path / "c", p_L=0.8, rule="uniform", device="cuda")
    write_run(tmp_path / "d", p_L=0.5, draw="sample", compile=True)
    write_run(tmp_path / "e", p_L=0.5)
    (setting,) = group(read_runs([tmp_path])[0])
    assert setting.constant is not None
    assert [run.run for run in setting.constant.runs] == ["a", "b"]
    assert [arm.runs[0].run for arm in setting.stochastic] == ["e", "d", "c"]  # most like the paper's first


def test_parts_of_another_size_are_another_training(tmp_path: Path) -> None:
    """BatchNorm normalises within a part: neither seeds of one training, nor the paper's."""
    for name, number in (("whole", 1), ("parts", 64)):
        write_run(tmp_path / name, p_L=1.0, micro_batches=number, **FULL)
    runs, _ = read_runs([tmp_path])
    assert len(group(runs)) == 2
    assert {run.run: run.recipe for run in runs} == {"whole": "cifar10", "parts": None}


@pytest.mark.parametrize(
    ("unlike", "says"),
    [
        ({"batch_size": 64}, "other settings than the paper's: 110 layers"),
        ({"milestones": [250]}, "other settings than the paper's: 110 layers"),
        ({"epochs": 501}, "other settings than the paper's: 110 layers"),
        ({"depth": 152}, "other settings than the paper's: 152 layers"),
        ({"depth": 104}, "reduced size: 104 layers"),
        ({"image_size": (40, 40)}, "other settings than the paper's: 110 layers"),
        ({"validation": 0.05, "num_train": 47_500}, "other settings than the paper's: 110 layers"),
        ({"epochs": 499}, "reduced size: 110 layers"),
        ({"num_train": 44_999}, "reduced size: 110 layers"),
        ({"depth": 26}, "reduced size: 26 layers"),
        ({"dataset": "svhn", "num_train": 598_388}, "reduced size: 110 layers"),  # of 152, on SVHN
        ({"widths": [4, 8, 16]}, "reduced size: 110 layers, widths 4 8 16, "),
    ],
)
def test_what_is_not_reduced_is_not_called_so(tmp_path: Path, unlike: dict[str, Any], says: str) -> None:
    write_run(tmp_path / "a", **{**FULL, **unlike})
    (run,) = read_runs([tmp_path])[0]
    assert size_mark([run]).startswith(says)
    names = [key for key in unlike if key not in ("num_train", "image_size")]  # those of params.yaml
    named = f"; not the paper's {', '.join(names)}" if says.startswith("other") and names else ""
    assert size_mark([run]).endswith(named)
    assert ("; not the paper's" in size_mark([run])) == bool(named)


@pytest.mark.parametrize("unlike", [{"epochs": 89}, {"depth": 50}, {"num_train": 600_000}])
def test_less_than_imagenets_trainings_is_reduced_whatever_other_data_have(
    tmp_path: Path, unlike: dict[str, Any]
) -> None:
    """SVHN's training has 152 layers and 50 epochs; ResNet's on ImageNet had 34 and 120, the paper's 152."""
    imagenet = {**load_recipes()["imagenet"].train, "num_train": 1_271_167, "image_size": (224, 224)}
    write_run(tmp_path / "a", **{**imagenet, **unlike})
    assert size_mark(read_runs([tmp_path])[0]).startswith("reduced size: ")


def test_a_warm_up_of_p_L_stands_against_the_same_constant_depth(tmp_path: Path) -> None:
    """At constant depth there is nothing to warm up; with stochastic depth it is another training."""
    write_run(tmp_path / "models" / "c", p_L=1.0, test_error=0.1)
    write_run(tmp_path / "models" / "s", p_L=0.5, test_error=0.12)
    write_run(tmp_path / "models" / "w", p_L=0.5, p_L_warmup_epochs=2, test_error=0.11)
    (setting,) = group(read_runs([tmp_path / "models"])[0])
    warm = "stochastic, p_L 0.5, p_L warmed up over 2 epochs"
    assert [arm.name for arm in setting.arms] == ["constant depth", "stochastic, p_L 0.5", warm]
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = read_table(tmp_path / "out" / "table1.csv")
    assert [(row["p_L_warmup_epochs"], row["constant_error_mean"]) for row in rows] == [(0, 0.1), (2, 0.1)]
    assert warm in (tmp_path / "out" / "index.html").read_text()


def test_reduced_size_is_marked_wherever_it_shows(tmp_path: Path) -> None:
    """In every row, every caption and every picture; the paper's numbers stand apart from it."""
    two_seeds(tmp_path / "models", dataset="cifar10")
    write_report([tmp_path / "models"], tmp_path / "out")
    mark = "reduced size: 20 layers, widths 4 8 8, cifar10, 9,000 images of 9 x 9 pixels, 3 epochs"
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
    assert pd.read_csv(tmp_path / "out" / "table1.csv")["mark"].isna().all()
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
        ({"rule": "uniform"}, "110 layers, 500 epochs, p_L 0.5, linear decay"),
        ({"draw": "sample"}, "110 layers, 500 epochs, p_L 0.5, drawn for each mini-batch"),
        ({"p_L_warmup_epochs": 9}, "110 layers, 500 epochs, p_L 0.5, no warm-up of p_L"),
        ({"dropout": 0.2, "p_L": 1.0}, "110 layers, 500 epochs, p_L 0.5, no dropout"),
        ({"depth": 20}, "110 layers, 500 epochs, p_L 0.5"),
    ],
)
def test_the_papers_numbers_say_of_what_they_are_unless_of_this_training(
    tmp_path: Path, unlike: dict[str, Any], context: str | None
) -> None:
    """All of these have the size of recipes; the paper has errors and times of the first only.

    What is other is said: layers, epochs and p_L alone can be those of this training, too.
    """
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
    write_run(tmp_path / "models" / "other", **{**params, **size, "p_L": 0.3})
    write_report([tmp_path / "models"], tmp_path / "out")
    rows = read_table(tmp_path / "out" / "table1.csv")
    assert [row["p_L"] for row in rows] == [0.5, 0.3]
    for row in rows:
        assert (row["full_size"], row["paper_recipe"]) == (True, "imagenet")
        assert (row["paper_constant_error"], row["paper_stochastic_error"]) == errors
    contexts = [row.get("paper_context") for row in rows]
    assert contexts == [None, f"152 layers, {epochs} epochs, p_L 0.5"]


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


def test_more_pictures_than_cifar10_has_are_not_its_own(tmp_path: Path) -> None:
    """CINIC-10 has the same classes and size, and 162,000 pictures to train and validate."""
    write_run(
        tmp_path / "a", dataset="imagefolder", class_names=CIFAR10, image_size=(32, 32), num_train=161_000
    )
    assert [run.pictures for run in read_runs([tmp_path])[0]] == ["imagefolder"]


def test_a_report_whose_table_went_through_pandas_is_the_same(tmp_path: Path) -> None:
    """Which writes `False`; read as a text, it made an augmented training of one without."""
    plain = {**FULL, **load_recipes()["cifar10-plain-data"].train}
    write_run(tmp_path / "models" / "c", **{**plain, "p_L": 1.0})
    write_report([tmp_path / "models"], tmp_path / "out")
    table1 = (tmp_path / "out" / "table1.csv").read_text()
    assert "cifar10-plain-data" in table1
    pd.read_csv(tmp_path / "out" / "runs.csv").to_csv(tmp_path / "out" / "runs.csv", index=False)
    assert ",False," in (tmp_path / "out" / "runs.csv").read_text()
    write_report([tmp_path / "out"], tmp_path / "again")
    assert (tmp_path / "again" / "table1.csv").read_text() == table1
    (row,) = rows_of(tmp_path / "again" / "runs.csv")
    assert (row["flip"], row["git_dirty"]) == ("false", "false")

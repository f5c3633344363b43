"""The page of a report, and the figures in it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from report_runs import FULL, rows_of, write_ensemble, write_run

from sdpipe.recipes import load_recipes
from sdpipe.report.figures import plan_figures
from sdpipe.report.plots import Sheet
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import group
from sdpipe.report.write import write_report


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


@pytest.mark.slow
def test_each_figure_is_drawn_once_the_runs_suffice(tmp_path: Path) -> None:
    write_run(tmp_path / "c", p_L=1.0)
    assert drawn(tmp_path) == {"As figure 3"}
    fingerprint = write_run(tmp_path / "s", p_L=0.5)
    assert drawn(tmp_path) == {"As figure 3", "Figure 7"}
    write_run(tmp_path / "s8", p_L=0.8)
    assert drawn(tmp_path) == {"As figure 3", "Figure 7", "Figure 8 left"}
    write_run(tmp_path / "c26", p_L=1.0, depth=26)
    expected = {"As figure 3", "Figure 7", "Figure 8 left"}
    assert drawn(tmp_path) == expected, "one depth of stochastic depth is no map"
    write_run(tmp_path / "s26", p_L=0.5, depth=26)
    assert drawn(tmp_path) == (expected := expected | {"Figure 5", "Figure 8 right"})
    write_run(tmp_path / "p", p_L=1.0, skip="plain")
    assert drawn(tmp_path) == expected
    write_run(tmp_path / "p26", p_L=1.0, skip="plain", depth=26)
    assert drawn(tmp_path) == (expected := expected | {"Degradation"})
    write_run(tmp_path / "b", p_L=1.0, skip="B")
    assert drawn(tmp_path) == (expected := expected | {"Skips"})
    write_run(tmp_path / "c32", p_L=1.0, depth=32)
    assert drawn(tmp_path) == (expected := expected | {"Depths"})
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
    rows = rows_of(tmp_path / "out" / "degradation.csv")
    nets = [("plain", "20"), ("plain", "26"), ("A", "20"), ("A", "26"), ("B", "20")]
    assert [(row["skip"], row["depth"]) for row in rows] == nets


@pytest.mark.parametrize(
    ("params", "number", "says"),
    [
        ({}, "Figure 3", "figure 3. "),
        ({"depth": 56}, "Figure 3", "figure 3, which has 110 layers. "),
        ({"shift_px": 0}, "Figure 3", "figure 3. "),
        ({"shift_px": 0, "flip": False}, "As figure 3", "figure 3, which has augmentation. "),
        (
            {"shift_px": 0, "flip": False, "depth": 56},
            "As figure 3",
            "figure 3, which has 110 layers and augmentation. ",
        ),
        (
            {"shift_px": 0, "flip": False, "depth": 1202},
            "As figure 4",
            "figure 4, which has augmentation, the curves of 1202 layers. ",
        ),
    ],
)
def test_curves_of_other_trainings_than_the_papers_say_so(
    tmp_path: Path, params: dict[str, Any], number: str, says: str
) -> None:
    """Of another depth, or without augmentation; then the paper's own figure is still called not drawn."""
    write_run(tmp_path / "a", **{**FULL, "flip": True, **params})
    (curves,), not_drawn = plan_figures(group(read_runs([tmp_path])[0]))
    assert curves.caption.startswith(f"As the paper's {says}")
    assert curves.number == number
    assert ("Figure 3" in {figure.number for figure in not_drawn}) == (number != "Figure 3")


def draw(models: Path, number: str) -> list[Axes]:
    (drawing,) = [one for one in plan_figures(group(read_runs([models])[0]))[0] if one.number == number]
    figure = drawing.draw(Sheet(path=models / "figure.png", title=drawing.title, mark=drawing.mark))
    return list(figure.axes)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_a_long_legend_leaves_the_axes_their_size(tmp_path: Path) -> None:
    """figure8-left has 16 stochastic trainings, and so 32 lines; a sweep over dropout has 10 curves."""
    heights = []
    for count in (1, 8):
        models = tmp_path / f"{count}"
        write_run(models / "c", p_L=1.0)
        for at in range(count):
            write_run(models / f"d{at}", p_L=1.0, dropout=0.05 + at / 20)
            for rule in ("linear_decay", "uniform"):
                run = models / f"{rule}{at}"
                write_ensemble(run, write_run(run, p_L=0.2 + at / 20, rule=rule))
        for number in ("As figure 3", "Ensemble"):
            axes = draw(models, number)[0]
            heights.append(axes.get_window_extent().height)
    assert heights[2:] == pytest.approx(heights[:2], rel=0.2)


def test_each_curve_of_a_figure_has_a_colour_of_its_own(tmp_path: Path) -> None:
    """Constant depth's, too."""
    for dropout in range(10):
        write_run(tmp_path / f"{dropout}", p_L=1.0, dropout=dropout / 10)
    curves = [line for line in draw(tmp_path, "As figure 3")[0].lines if line.get_label().startswith("const")]
    assert len({line.get_color() for line in curves}) == len(curves) == 10


@pytest.mark.filterwarnings("error")
def test_a_training_loss_of_zero_is_drawn_without_a_warning(tmp_path: Path) -> None:
    """On a linear scale, since a logarithmic one has no 0."""
    write_run(tmp_path / "a")
    path = tmp_path / "a" / "history.csv"
    path.write_text(re.sub(r"(?m)^(\d,[\d.]+),[\d.]+", r"\1,0.0", path.read_text()))
    losses = draw(tmp_path, "As figure 3")[1]
    assert losses.get_yscale() == "linear"
    assert set(losses.lines[0].get_ydata()) == {0}


def test_a_run_of_one_validation_is_a_point(tmp_path: Path) -> None:
    write_run(tmp_path / "a", validated_at=(1, 2))
    for axes in draw(tmp_path, "As figure 3"):
        assert all(line.get_marker() != "." for line in axes.lines)
    folder = tmp_path / "a"
    for name in ("history.csv", "timing.csv"):
        header, _, second = (folder / name).read_text().splitlines()
        (folder / name).write_text(f"{header}\n{second}\n")
    for axes in draw(tmp_path, "As figure 3"):
        assert any(line.get_marker() == "." for line in axes.lines)


def test_one_run_has_no_error_bar(tmp_path: Path) -> None:
    """Of length zero it would say that seeds do not differ."""
    for p_L in (0.5, 0.8):
        write_run(tmp_path / f"{p_L}", p_L=p_L)
    caps = [line for line in draw(tmp_path, "Figure 8 left")[0].lines if line.get_marker() == "_"]
    assert caps
    assert np.isnan([cap.get_ydata(orig=False) for cap in caps]).all()
    write_run(tmp_path / "second", p_L=0.5, seed=1, test_error=0.2)
    caps = [line for line in draw(tmp_path, "Figure 8 left")[0].lines if line.get_marker() == "_"]
    assert [sum(~np.isnan(cap.get_ydata(orig=False))) for cap in caps] == [1, 1]


def write_draws(folder: Path, fingerprint: str, members: tuple[int, ...], error: float, seed: int) -> None:
    header = "fingerprint,members,seed,ensemble_error,test_network_error,ensemble_nll,test_network_nll"
    rows = [f"{fingerprint},{count},{seed},{error},{error},{error},{error}" for count in members]
    (folder / "ensemble.csv").write_text("\n".join([header, *rows]) + "\n")


def test_points_of_an_ensemble_are_of_the_same_runs(tmp_path: Path) -> None:
    """Of runs with other numbers of sub-networks the mean moved for the runs that were left."""
    for seed, (error, members) in enumerate([(0.3, (1, 4, 16)), (0.1, (1, 4))]):
        folder = tmp_path / f"s{seed}"
        write_draws(folder, write_run(folder, p_L=0.5, seed=seed), members, error, 0)
    solid, dashed = (line for line in draw(tmp_path, "Ensemble")[0].lines if line.get_linestyle() in "--")
    assert list(solid.get_xdata()) == [1, 4]
    assert list(solid.get_ydata()) == pytest.approx([20, 20])
    assert list(dashed.get_ydata()) == pytest.approx([20, 20])


def ensembles(models: Path) -> tuple[list[str], list[str]]:
    """The captions of those drawn, and what is said of those that are not."""
    drawings, not_drawn = plan_figures(group(read_runs([models])[0]))
    found = [one.caption for one in drawings if one.number == "Ensemble"]
    return found, [f"{one.title}: {one.missing}" for one in not_drawn if one.number == "Ensemble"]


def test_ensembles_of_no_common_number_are_not_drawn_for_that_reason(tmp_path: Path) -> None:
    """The page said that no run has an ensemble; and, of two trainings, nothing of the one left out."""
    for seed, members in enumerate([(1, 4), (2,)]):
        folder = tmp_path / f"s{seed}"
        write_draws(folder, write_run(folder, p_L=0.5, seed=seed), members, 0.2, 0)
    reason = (
        "sampled sub-networks against the test network, animals, 20 layers, stochastic, p_L 0.5: "
        "a number of sub-networks that the ensembles of all its runs have"
    )
    assert ensembles(tmp_path) == ([], [reason])
    write_draws(tmp_path / "t", write_run(tmp_path / "t", p_L=0.8), (1,), 0.2, 0)
    drawn_captions, reasons = ensembles(tmp_path)
    assert (len(drawn_captions), reasons) == (1, [reason])


def test_ensembles_of_other_draws_say_so(tmp_path: Path) -> None:
    """By number, and with all digits: the second came as 4.29497e+09, the third as one less."""
    seeds = (9, 4294967295, 9007199254740993)
    for at, seed in enumerate(seeds):
        folder = tmp_path / f"s{at}"
        write_draws(folder, write_run(folder, p_L=0.5, seed=at), (1, 4), 0.2, seed)
        (text,), _ = ensembles(tmp_path)
        named = f"The sub-networks were drawn with different seeds: {', '.join(map(str, seeds))}."
        assert text.endswith(named) == (at == 2)


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
    assert "with <code>skip: plain</code> and with skips" in page
    assert "`" not in page
    assert "sdpipe ensemble" in page


@pytest.mark.slow
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

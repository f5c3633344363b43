"""Which settings stand beside each other in a figure, and what its caption calls it."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from sdpipe.report.figures import plan_figures
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import Kind, group
from sdpipe.report.write import write_report


def test_bars_and_degradation_stand_beside_one_constant_depth(tmp_path: Path) -> None:
    """One without dropout and one with are two: their errors would differ by more than the depth."""
    for depth, dropout in ((8, 0.0), (14, 0.5)):
        write_run(tmp_path / f"c{depth}", p_L=1.0, depth=depth, dropout=dropout)
        write_run(tmp_path / f"s{depth}", p_L=0.5, depth=depth, dropout=0.5)
        write_run(tmp_path / f"p{depth}", p_L=1.0, depth=depth, skip="plain", dropout=dropout)
    assert not {"Figure 5", "Degradation"} & figures_of(tmp_path)
    write_run(tmp_path / "c14-without", p_L=1.0, depth=14)
    write_run(tmp_path / "p14-without", p_L=1.0, depth=14, skip="plain")
    assert {"Figure 5", "Degradation"} <= figures_of(tmp_path)


def figures_of(models: Path) -> set[str]:
    return {drawing.number for drawing in plan_figures(group(read_runs([models])[0]))[0]}


@pytest.mark.slow
def test_what_differs_behind_six_digits_has_figures_of_its_own(tmp_path: Path) -> None:
    for depth in (8, 14):
        for p_L in (0.5, 0.8):
            for dropout in (0.2, 0.20000001):
                write_run(
                    tmp_path / "models" / f"{depth}-{p_L}-{dropout}", depth=depth, p_L=p_L, dropout=dropout
                )
    assert write_report([tmp_path / "models"], tmp_path / "out") == []
    assert len(list((tmp_path / "out").glob("p_L-depth-*.png"))) == 2


@pytest.mark.slow
def test_what_differs_is_named_beside_dropout(tmp_path: Path) -> None:
    """A half-finished sweep over dropout: of each learning rate one depth has a run without it, too.

    Its label named no learning rate then, and the heatmaps of both had one name.
    """
    for rate, with_dropout_only in ((0.1, 8), (0.01, 14)):
        for depth in (8, 14):
            shared = {"learning_rate": rate, "depth": depth}
            for p_L in (0.5, 0.8):
                write_run(tmp_path / "models" / f"{rate}-{depth}-{p_L}", p_L=p_L, dropout=0.2, **shared)
            if depth != with_dropout_only:
                write_run(tmp_path / "models" / f"{rate}-{depth}", p_L=0.5, **shared)
    labels = [setting.label for setting in group(read_runs([tmp_path / "models"])[0])]
    assert labels == [
        "animals, 8 layers, dropout 0.2, learning_rate 0.1",
        "animals, 8 layers, learning_rate 0.01",
        "animals, 14 layers, dropout 0.2, learning_rate 0.01",
        "animals, 14 layers, learning_rate 0.1",
    ]
    write_report([tmp_path / "models"], tmp_path / "out")
    assert len(list((tmp_path / "out").glob("p_L-depth-*learning-rate-0.*.png"))) == 2


@pytest.mark.slow
def test_no_figure_is_lost_where_names_of_files_are_alike(tmp_path: Path) -> None:
    """Data sets of names that differ in a blank have curves, bars and gradients of their own."""
    for name in ("my data", "my-data"):
        for depth, p_L in product((8, 14), (0.5, 1.0)):
            write_run(tmp_path / "models" / f"{name}{depth}{p_L}", dataset=name, depth=depth, p_L=p_L)
    write_report([tmp_path / "models"], tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").glob("*-8*.png")}
    bars, curves = "depths-my-data-8-and-14-layers-stochastic-p-l-0.5", "curves-my-data-8-layers"
    assert {f"{name}{number}.png" for name in (bars, curves) for number in ("", "-2")} < found


@pytest.mark.parametrize(
    ("rule", "named"), [("linear_decay", ""), ("uniform", ", uniform"), ("late_drop", ", late drop")]
)
def test_every_rule_but_the_papers_is_named(rule: str, named: str) -> None:
    """Also one that somebody adds."""
    assert Kind(p_L=0.5, rule=rule).name == f"stochastic, p_L 0.5{named}"


def test_the_caption_names_the_resnet_papers_figures_of_the_family(tmp_path: Path) -> None:
    for family, depths, widths in (("cifar", (8, 14), [4, 4, 4]), ("imagenet", (18, 34), [4, 4, 4, 4])):
        for depth in depths:
            for skip in ("A", "plain"):
                params = {"family": family, "depth": depth, "widths": widths, "skip": skip, "p_L": 1.0}
                write_run(tmp_path / f"{depth}{skip}", **params)
    found = [
        drawing.caption
        for drawing in plan_figures(group(read_runs([tmp_path])[0]))[0]
        if drawing.number == "Degradation"
    ]
    assert [caption[:20] for caption in found] == ["As figures 1 and 6 o", "As figures 1 and 4 o"]


@pytest.mark.parametrize(
    ("params", "number"),
    [
        ({"dataset": "cifar10", "depth": 1202}, "Figure 4"),
        ({"depth": 1202}, "As figure 3"),
        ({"dataset": "cifar10", "depth": 1208}, "Figure 3"),
    ],
)
def test_figure_4_is_of_1202_layers_on_cifar10(tmp_path: Path, params: dict[str, Any], number: str) -> None:
    write_run(tmp_path / "a", **params)
    assert figures_of(tmp_path) == {number}


@pytest.mark.slow
def test_a_seed_that_was_run_more_than_once_is_said_wherever_seeds_are(tmp_path: Path) -> None:
    """In both tables of the page, and beside bars, p_L and heatmap; not where each seed is one run."""
    for depth, p_L in product((8, 14), (0.5, 0.8, 1.0)):
        write_run(tmp_path / "models" / f"{depth}-{p_L}", depth=depth, p_L=p_L)
    write_report([tmp_path / "models"], tmp_path / "out")
    said = "a seed was run more than once"
    assert said not in (tmp_path / "out" / "index.html").read_text()
    write_run(tmp_path / "models" / "again", depth=8, p_L=1.0, precision="bf16")
    write_report([tmp_path / "models"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    _, _, first, second, *_ = page.split("<section>")
    assert (first.count(said), second.count(said)) == (2, 2)  # of two trainings with 8 layers
    captions = re.findall("<figcaption>.*?</figcaption>", page)
    found = [text.split(":")[0].rpartition(">")[2] for text in captions if said in text]
    assert found == ["Figure 5", "Figure 5", "Figure 8 left", "Figure 8 right"]

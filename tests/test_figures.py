"""What is in the report's figures: the data on their axes, drawn from runs whose numbers are known."""

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from report_runs import write_ensemble, write_run

from sdpipe.drawing import mark_drops
from sdpipe.recipes import load_recipes, with_seeds
from sdpipe.report.figures import plan_figures
from sdpipe.report.plots import Sheet
from sdpipe.report.reading import read_runs
from sdpipe.report.settings import group


def drawn(models: Path, number: str) -> Figure:
    """The one figure of this number that the runs suffice for."""
    (drawing,) = [one for one in plan_figures(group(read_runs([models])[0]))[0] if one.number == number]
    return drawing.draw(Sheet(path=models / ".figure.png", title=drawing.title, mark=drawing.mark))


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Name in the legend -> points."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in line.get_xydata()]  # type: ignore[union-attr]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def errorbars(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The same, of lines that have error bars."""
    return {
        str(bars.get_label()): [(float(x), float(y)) for x, y in bars[0].get_xydata()]
        for bars in axes.containers
        if isinstance(bars, ErrorbarContainer)
    }


def upright(axes: Axes) -> list[float]:
    """Where the dotted lines stand."""
    return [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]  # type: ignore[index]


def close(points: list[tuple[float, float]]) -> Any:
    return [pytest.approx(point, abs=1e-9) for point in points]


def history(*rates: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, "learning_rate": rate} for epoch, rate in enumerate(rates, start=1)]


def test_a_drop_is_marked_at_its_milestone() -> None:
    """Milestones 10 and 15 of 20 epochs: row 11, the end of the 11th epoch, is the first of a lower rate."""
    axes = Figure().subplots()
    mark_drops(axes, history(*[0.1] * 10, *[0.01] * 5, *[0.001] * 5))
    assert upright(axes) == [10, 15]


def test_only_drops_that_all_runs_share_are_marked() -> None:
    axes = Figure().subplots()
    mark_drops(axes, history(1, 1, 0.1, 0.1, 0.01), history(1, 0.1, 0.1, 0.1, 0.01))
    assert upright(axes) == [4]


# Runs of report_runs.py: validation errors 50, 25 and 37.5 %, training losses 2, 1 and 2/3, gradients 0.01,
# 0.005 and 0.01/3 after the epochs 1, 2 and 3, and a lower learning rate in the third.
ERRORS = [(1, 50), (2, 25), (3, 37.5)]
LOSSES = [(1, 2), (2, 1), (3, 2 / 3)]


def test_figure_3_shows_validation_errors_losses_and_the_lowest_error(tmp_path: Path) -> None:
    write_run(tmp_path / "c", p_L=1.0, test_error=0.11)
    write_run(tmp_path / "s", p_L=0.5, test_error=0.13)
    errors, losses = drawn(tmp_path, "As figure 3").axes
    names = ("constant depth", "stochastic, p_L 0.5")
    assert errors.get_ylabel() == "validation error (%)"
    assert lines(errors) == {name: close(ERRORS) for name in names} | {
        f"lowest, {name}": close([(2, 25)]) for name in names
    }
    assert losses.get_ylabel() == "training loss"
    assert lines(losses) == {name: close(LOSSES) for name in names}
    assert upright(errors) == upright(losses) == [2]


def test_seeds_are_drawn_with_their_mean_and_each_with_its_own_lowest_error(tmp_path: Path) -> None:
    """The second seed was validated after the epochs 2, 3 and 4 as the first after 1, 2 and 3."""
    write_run(tmp_path / "a", p_L=1.0)
    write_run(tmp_path / "b", p_L=1.0, seed=1, validated_at=(2, 3, 4))
    errors, _ = drawn(tmp_path, "As figure 3").axes
    found = lines(errors)
    # both have the epochs 2 and 3: (25 + 50) / 2 and (37.5 + 25) / 2
    assert found["constant depth, mean of 2"] == close([(2, 37.5), (3, 31.25)])
    assert found["lowest, constant depth"] == close([(2, 25), (3, 25)])


def test_figure_7_shows_gradients(tmp_path: Path) -> None:
    write_run(tmp_path / "c", p_L=1.0)
    write_run(tmp_path / "s", p_L=0.5)
    (axes,) = drawn(tmp_path, "Figure 7").axes
    gradients = close([(1, 0.01), (2, 0.005), (3, 0.01 / 3)])
    assert axes.get_ylabel() == "mean absolute gradient"
    assert lines(axes) == {"constant depth": gradients, "stochastic, p_L 0.5": gradients}
    assert upright(axes) == [2]


def two_depths(models: Path) -> None:
    """Test errors in percent: 20 layers 10 and 20, mean 15, at constant depth, 30 stochastic; 26: 12, 31."""
    write_run(models / "c20", p_L=1.0, test_error=0.1)
    write_run(models / "c20-1", p_L=1.0, test_error=0.2, seed=1)
    write_run(models / "s20", p_L=0.5, test_error=0.3)
    write_run(models / "c26", p_L=1.0, test_error=0.12, depth=26)
    write_run(models / "s26", p_L=0.5, test_error=0.31, depth=26)


def test_figure_5_shows_test_errors(tmp_path: Path) -> None:
    two_depths(tmp_path)
    (axes,) = drawn(tmp_path, "Figure 5").axes
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in axes.patches}  # type: ignore[attr-defined]
    # two bars of 0.4 at each depth: at -0.2 and 0.2 of it
    assert bars == pytest.approx({-0.2: 15, 0.8: 12, 0.2: 30, 1.2: 31})
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20", "26"]
    assert axes.get_xlabel() == "layers"
    # one standard deviation of 10 and 20: sqrt(2 * 5^2 / 1) = 7.0710678
    ((_, _, (spread,)),) = [bars for bars in axes.containers if isinstance(bars, ErrorbarContainer)]
    assert spread.get_segments()[0][:, 1] == pytest.approx([15 - 7.0710678, 15 + 7.0710678])


def test_figure_8_left_shows_test_errors_and_the_constant_depths_line(tmp_path: Path) -> None:
    write_run(tmp_path / "c", p_L=1.0, test_error=0.1)
    for rule, p_L, error in (("linear_decay", 0.5, 0.2), ("linear_decay", 0.8, 0.3), ("uniform", 0.5, 0.4)):
        write_run(tmp_path / f"{rule}{p_L}", p_L=p_L, rule=rule, test_error=error)
    (axes,) = drawn(tmp_path, "Figure 8 left").axes
    assert errorbars(axes) == {"linear decay": close([(0.5, 20), (0.8, 30)]), "uniform": close([(0.5, 40)])}
    assert lines(axes) == {"constant depth, 10.00 %": close([(0, 10), (1, 10)])}  # over the whole width


def test_figure_8_right_shows_test_errors(tmp_path: Path) -> None:
    """A row for each p_L, 1 first, a column for each depth."""
    two_depths(tmp_path)
    axes = drawn(tmp_path, "Figure 8 right").axes[0]
    assert axes.images[0].get_array().ravel().tolist() == pytest.approx([15, 12, 30, 31])
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "15.00\n± 7.07", (1, 0): "12.00", (0, 1): "30.00", (1, 1): "31.00"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1 (constant)", "0.5"]


def test_captions_of_figure_8_say_how_many_runs_are_behind_a_point(tmp_path: Path) -> None:
    """At 20 layers two runs at constant depth; then two of each."""

    def captions() -> dict[str, str]:
        drawings = plan_figures(group(read_runs([tmp_path])[0]))[0]
        return {one.number: one.caption for one in drawings if one.number.startswith("Figure 8")}

    two_depths(tmp_path)
    found = captions()["Figure 8 right"]
    assert "Runs at each point, from left to right: p_L 1 2, 1; p_L 0.5 1, 1." in found
    for depth in (20, 26):
        write_run(tmp_path / f"again{depth}", p_L=0.5, depth=depth, seed=7)
        write_run(tmp_path / f"first{depth}", p_L=0.8, depth=depth, seed=0)
        write_run(tmp_path / f"second{depth}", p_L=0.8, depth=depth, seed=7)
    write_run(tmp_path / "constant", p_L=1.0, depth=26, seed=7)
    assert "Runs at each point: 2." in captions()["Figure 8 right"]
    assert captions()["Figure 8 left"].endswith("Runs at each point: 2. Runs at constant depth: 2.")


def test_figure_8_left_shows_every_kind_of_training(tmp_path: Path) -> None:
    """Two rules, drawn in two ways, with and without dropout: eight lines, more than there are colours."""
    for rule, draw, dropout in product(("linear_decay", "uniform"), ("batch", "sample"), (0.0, 0.2)):
        for p_L in (0.5, 0.8):
            name = f"{rule}-{draw}-{dropout}-{p_L}"
            write_run(tmp_path / name, p_L=p_L, rule=rule, draw=draw, dropout=dropout)
    (axes,) = drawn(tmp_path, "Figure 8 left").axes
    assert len(errorbars(axes)) == 8


@pytest.mark.slow
def test_numbers_of_figure_8_right_do_not_touch(tmp_path: Path) -> None:
    """On the grid of the recipe figure8-right with two seeds: 6 depths, 6 p_L, errors like 12.34 ± 12.34."""
    for run, overrides in with_seeds(load_recipes()["figure8-right"].runs, 2).items():
        write_run(tmp_path / run, test_error=0.3 - 0.1745 * overrides["seed"], **overrides)
    axes = drawn(tmp_path, "Figure 8 right").axes[0]
    boxes = apart(axes.texts)
    assert len(boxes) == 36
    column_px = axes.get_window_extent().width / 6
    assert max(box.width for box in boxes) < 0.9 * column_px


def apart(texts: Sequence[Text]) -> list[Bbox]:
    """Where they stand in their figure, in pixels, no two of them on each other."""
    renderer = FigureCanvasAgg(texts[0].figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    return boxes


@pytest.mark.slow
@pytest.mark.parametrize(("number", "count"), [("Figure 5", 24), ("Figure 8 right", 24), ("Depths", 12)])
def test_figures_of_many_depths_are_wide_enough_for_their_numbers(
    tmp_path: Path, number: str, count: int
) -> None:
    """Of 12, over the bars and in the cells, and under both; they ran into each other."""
    for depth, p_L, seed in product(range(104, 176, 6), (0.5, 1.0), (0, 1)):
        run = tmp_path / f"{depth}-{p_L}-{seed}"
        write_run(run, depth=depth, p_L=p_L, seed=seed, test_error=0.3 - 0.1745 * seed)
    axes = drawn(tmp_path, number).axes[0]
    assert len(apart(axes.texts)) == count
    assert len(apart(axes.get_xticklabels())) == 12


def test_degradation_shows_the_depths_that_both_kinds_have(tmp_path: Path) -> None:
    """Residual nets of a further depth, as figure8-right trains them, belong into other figures."""
    for depth in (14, 20, 26):
        write_run(tmp_path / f"r{depth}", p_L=1.0, depth=depth)
        if depth != 14:
            write_run(tmp_path / f"p{depth}", p_L=1.0, depth=depth, skip="plain")
    figure = drawn(tmp_path, "Degradation")
    assert "20 and 26 layers" in figure.get_suptitle()
    assert [axes.get_title() for axes in figure.axes[:2]] == ["plain", "residual, skips of option A"]
    for axes in figure.axes[:2]:
        assert lines(axes) == {"20 layers": close(LOSSES), "26 layers": close(LOSSES)}
    for axes in figure.axes[2:]:
        assert lines(axes) == {"20 layers": close(ERRORS), "26 layers": close(ERRORS)}
        assert upright(axes) == [2]


def test_each_option_of_skips_has_a_degradation_figure_that_names_it(tmp_path: Path) -> None:
    """And a curve in the figure of its depth, beside the plain net's."""
    for depth, skip in product((20, 26), ("plain", "A", "B", "C")):
        write_run(tmp_path / f"{skip}{depth}", p_L=1.0, depth=depth, skip=skip)
    drawings = plan_figures(group(read_runs([tmp_path])[0]))[0]
    degraded = [one for one in drawings if one.number == "Degradation"]
    assert [one.title.partition(",")[0] for one in degraded] == [
        f"Plain nets against residual ones with skips of option {skip}" for skip in "ABC"
    ]
    assert len({one.name for one in degraded}) == 3
    found = [one for one in drawings if one.number == "Skips"]
    assert [one.title.rpartition(": ")[2] for one in found] == ["animals, 20 layers", "animals, 26 layers"]
    errors, losses = found[0].draw(Sheet(path=tmp_path / ".figure.png", title="", mark="")).axes
    names = ("plain", "option A", "option B", "option C")
    assert lines(losses) == {name: close(LOSSES) for name in names}
    assert {name for name in lines(errors) if "lowest" not in name} == set(names)
    assert len({line.get_color() for line in losses.lines if line.get_label() in names}) == 4


def test_depths_show_test_errors_at_constant_depth(tmp_path: Path) -> None:
    """Of three depths or more that share all else; of one of them two seeds, 12 and 14 %."""
    for depth, error in ((20, 0.1), (32, 0.12), (110, 0.09)):
        write_run(tmp_path / f"{depth}", p_L=1.0, depth=depth, test_error=error)
        write_run(tmp_path / f"other{depth}", p_L=1.0, depth=depth, epochs=4 + depth, validated_at=(1, 2))
    write_run(tmp_path / "32-1", p_L=1.0, depth=32, test_error=0.14, seed=1)
    figure = drawn(tmp_path, "Depths")
    (axes,) = figure.axes
    assert "20, 32 and 110 layers" in figure.get_suptitle().replace("\n", " ")
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([10, 13, 9])  # type: ignore[attr-defined]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["20", "32", "110"]


def test_the_ensembles_figure_shows_errors_and_likelihoods(tmp_path: Path) -> None:
    """One member: errors 0.20 and 0.21 of two draws; four: 0.12 twice; the test network: 0.1."""
    write_ensemble(tmp_path / "s", write_run(tmp_path / "s", p_L=0.5))
    errors, likelihoods = drawn(tmp_path, "Ensemble").axes
    assert errorbars(errors) == {"sub-networks, p_L 0.5": close([(1, 20.5), (4, 12)])}
    assert lines(errors) == {"test network, p_L 0.5": close([(0, 10), (1, 10)])}
    assert errorbars(likelihoods) == {"p_L 0.5": close([(1, 0.5), (4, 0.4)])}
    assert [line.get_ydata()[0] for line in likelihoods.lines if line.get_linestyle() == "--"] == [0.3]  # type: ignore[index]


def test_each_test_network_of_the_ensembles_counts_once(tmp_path: Path) -> None:
    """Errors of the two: 0.1, beside three numbers of members, and 0.3, beside one; 0.2 is their mean."""
    header = "fingerprint,members,seed,ensemble_error,test_network_error,ensemble_nll,test_network_nll\n"
    for seed, (error, members) in enumerate([(0.1, (1, 4, 16)), (0.3, (1,))]):
        fingerprint = write_run(tmp_path / f"s{seed}", p_L=0.5, seed=seed)
        rows = "".join(f"{fingerprint},{count},0,0.4,{error},0.5,{error}\n" for count in members)
        (tmp_path / f"s{seed}" / "ensemble.csv").write_text(header + rows)
    errors, likelihoods = drawn(tmp_path, "Ensemble").axes
    assert lines(errors) == {"test network, p_L 0.5": close([(0, 20), (1, 20)])}
    (test_network,) = [line for line in likelihoods.lines if line.get_linestyle() == "--"]
    assert test_network.get_ydata() == pytest.approx([0.2, 0.2])


def test_figure_7_leaves_out_where_block_1_was_never_active(tmp_path: Path) -> None:
    """The history says 0 there, which is no gradient: nothing is drawn, and no mean over seeds has it."""
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", p_L=0.5, seed=seed)
        write_run(tmp_path / f"c{seed}", p_L=1.0, seed=seed)
    path = tmp_path / "s0" / "history.csv"
    path.write_text(path.read_text().replace(",0.005\n", ",0.0\n"))  # of epoch 2
    (axes,) = drawn(tmp_path, "Figure 7").axes
    assert lines(axes)["stochastic, p_L 0.5, mean of 2"] == close([(1, 0.01), (3, 0.01 / 3)])
    assert all(line.get_ydata().min() > 0 for line in axes.lines if line.get_linestyle() == "-")  # type: ignore[union-attr]

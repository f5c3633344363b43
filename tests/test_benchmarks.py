import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from benchmarks import uncertainty
from benchmarks.cost import multiply_adds
from benchmarks.loading import main as measure_loading
from benchmarks.plain import PlainScript
from benchmarks.recipes import MEASURED_PATH as RECIPES_PATH
from benchmarks.recipes import main as measure_recipes
from benchmarks.recipes import markdown as recipes_markdown
from benchmarks.settings import train_config
from benchmarks.table import EPOCH_ROWS, EPOCH_TARGET, STEP_ROWS, STEP_TARGET, markdown
from benchmarks.table import main as print_tables
from benchmarks.timing import ratio
from benchmarks.training import main as measure
from sdpipe.files import read_json
from sdpipe.network import NetworkConfig
from sdpipe.recipes import Recipe
from sdpipe.runtime.turns import order

SMALL = {
    "--depth": 8,
    "--epoch-depth": 8,
    "--batch-size": 8,
    "--steps": 5,
    "--warmup": 1,
    "--epoch-steps": 6,
    "--chunk": 2,
    "--repeats": 2,
    "--workers": 1,
}


def network(depth: int, widths: tuple[int, ...]) -> NetworkConfig:
    return NetworkConfig(
        family="cifar",
        depth=depth,
        widths=widths,
        skip="A",
        dropout=0.0,
        rule="linear_decay",
        p_L=0.5,
        in_channels=3,
        num_classes=10,
    )


def test_multiply_adds_by_hand() -> None:
    """Stem and head always count, an inactive block does not, and a transitional block halves the size."""
    costs = multiply_adds(network(8, (4, 8, 16)), 8, 8)
    stem, head = 9 * 3 * 4 * 64, 16 * 10
    assert costs.always == stem + head == 7_072
    assert costs.blocks == (9 * (16 + 16) * 64, 9 * (32 + 64) * 16, 9 * (128 + 256) * 4)
    assert costs.blocks == (18_432, 13_824, 13_824)
    assert costs.active_share([True, True, True]) == 1
    assert costs.active_share([True, False, True]) == (7_072 + 18_432 + 13_824) / 53_152
    assert costs.active_share([False, False, False]) == 7_072 / 53_152


def test_multiply_adds_at_odd_sizes() -> None:
    """9 pixels become 5, then 3, as in the network."""
    assert multiply_adds(network(8, (4, 4, 4)), 9, 9).blocks == (288 * 81, 288 * 25, 288 * 9)


def test_multiply_adds_of_resnet20() -> None:
    """40.55 million on CIFAR-10, the figure that papers on pruning start from."""
    costs = multiply_adds(network(20, (16, 32, 64)), 32, 32)
    assert costs.always + sum(costs.blocks) == 40_551_040


def test_every_variant_is_first_as_often_and_never_behind_the_same_one_only() -> None:
    rounds = [order(["a", "b", "c"], number) for number in range(6)]
    assert rounds[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert rounds[3:] == [["c", "b", "a"], ["a", "c", "b"], ["b", "a", "c"]]


def test_ratios_are_paired() -> None:
    """A round that is slow for both says what a fast one says."""
    found = ratio(np.array([2.0, 20.0, 3.0]), np.array([1.0, 10.0, 2.0]))
    assert found == {"n": 3, "median": 2, "quartile_1": 1.75, "quartile_3": 2, "of_sums": 25 / 13}


def numbers(values: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in the results, with its path."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value


@pytest.mark.slow
def test_the_command_measures_and_writes_both_tables(tmp_path: Path) -> None:
    """Every figure in the file is finite and positive, and the tables printed hold each ratio."""
    out = tmp_path / "new" / "results.json"
    options = [str(word) for option in SMALL.items() for word in option]
    done = CliRunner().invoke(measure, ["--out", str(out), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert {"date", "hardware", "compute", "num_threads", "versions", "settings"} < set(results)
    steps, epochs = results["steps"]["rows"], results["epochs"]["rows"]
    assert (set(steps), set(epochs)) == (set(STEP_ROWS), set(EPOCH_ROWS))
    for path, value in numbers({"steps": results["steps"], "epochs": results["epochs"]}):
        assert np.isfinite(value), path
        assert value > 0 or path.endswith("num_checkpoints") or "groups_s" in path, path
    assert steps["constant"]["ratio"]["of_sums"] == epochs["bare_constant"]["ratio"]["of_sums"] == 1
    assert {row["ratio"]["n"] for row in steps.values()} == {5}
    assert {row["ratio"]["n"] for row in epochs.values()} == {3}
    tables = markdown(results)
    assert tables in done.stdout
    for name, row in {**steps, **epochs}.items():
        if name not in ("constant", "bare_stochastic", "bare_constant"):
            assert f"{row['ratio']['median']:.3f} (" in tables, name
            assert f"| {row['ratio']['of_sums']:.3f} |" in tables, name
    for word in (results["hardware"], results["date"], "n = 5", "n = 3"):
        assert word in tables
    again = CliRunner().invoke(print_tables, [str(out)], catch_exceptions=False)
    assert again.stdout == tables + "\n"


def test_the_users_params_change_nothing() -> None:
    """Another recipe in params.yaml, as for the pictures of ImageNet, leaves the benchmark as it is."""
    config = train_config(depth=20, batch_size=128, p_L=0.5)
    assert (config.dataset, config.crop, config.shift_px, config.flip) == ("cifar10", None, 4, True)


def test_the_plain_script_has_the_algorithms_that_pytorch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not sdpipe's deterministic ones, which are back behind its turn; of a step forward and backward."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images_NHWC, labels_N = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    config = train_config(depth=8, batch_size=4, p_L=1.0)
    script = PlainScript(config, images_NHWC, labels_N, torch.device("cpu"), workers=0)
    seen: list[bool] = []
    for parameter in script._network.parameters():
        parameter.register_hook(lambda _gradient: seen.append(torch.backends.cudnn.deterministic))
    with closing(script):
        script._network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.deterministic))
        script.turn(1)
    assert len(seen) > 1
    assert not any(seen)
    assert torch.backends.cudnn.deterministic


def test_the_committed_measurement_is_printed_without_an_argument() -> None:
    done = CliRunner().invoke(print_tables, [], catch_exceptions=False)
    assert done.stdout == markdown(read_json(ROOT / "benchmarks" / "training.json")) + "\n"


@pytest.mark.slow
def test_the_share_of_waiting_for_pictures_is_measured() -> None:
    """Four numbers, of which the shares are at most 1, and no file is left."""
    options = ["--steps", "2", "--batch-size", "4", "--workers", "1"]
    done = CliRunner().invoke(measure_loading, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = {
        name: float(value) for name, value in (line.split(": ") for line in done.stdout.splitlines()[-4:])
    }
    assert all(0 < value <= 1 for name, value in found.items() if name.startswith("share_waiting"))
    assert len(found) == 4
    assert not list(Path(".sdpipe").glob("benchmark-*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--depth", "9"], "expected a depth of 6n + 2"),
        (["--epoch-steps", "7", "--chunk", "2"], "expected a multiple of --chunk 2"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    tmp_path: Path, options: list[str], words: str
) -> None:
    done = CliRunner().invoke(measure, ["--out", str(tmp_path / "results.json"), *options])
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_foreign_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    done = CliRunner().invoke(print_tables, [str(tmp_path / "other.json")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "expected a file of benchmarks.training" in done.stderr


def test_the_readme_has_the_tables_of_the_committed_measurement() -> None:
    """Nothing in them was typed by hand; the targets are met, and what is missed by multiply-adds is said."""
    results = read_json(ROOT / "benchmarks" / "training.json")
    readme = (ROOT / "README.md").read_text()
    assert markdown(results) in readme
    active = results["steps"]["active"]
    said = readme.split("By multiply-adds")[1].split("\n\n")[0]
    for name in ("ratio_to_share", "ratio_to_time_share"):
        assert f"{active[name]['of_sums']:.3f}" in said
    assert active["ratio_to_time_share"]["of_sums"] <= STEP_TARGET
    assert ("misses" in said) == (active["ratio_to_share"]["of_sums"] > STEP_TARGET)
    assert f"{active['ratio_to_share']['median']:.3f}" in said
    assert active["ratio_to_share"]["n"] >= 40
    for kind in ("stochastic", "constant"):
        assert results["epochs"]["rows"][f"loop_{kind}"]["ratio_with_checkpoints"]["of_sums"] <= EPOCH_TARGET


# Those without a constant twin: with dropout there is none, and plain nets have no stochastic one.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "runs", "alone"),
    [
        ("degradation", ["residual-d20", "residual-d56", "plain-d20", "plain-d56"], 4),
        ("dropout", ["stochastic", "constant", "dropout"], 2),
    ],
)
def test_the_cost_of_recipes_is_measured(tmp_path: Path, name: str, runs: list[str], alone: int) -> None:
    """Networks at full size, one step each; what they have no constant twin for has no ratio."""
    out = tmp_path / "recipes.json"
    arguments = ["--out", str(out), "--recipe", name, "--steps", "1", "--warmup", "0"]
    done = CliRunner().invoke(measure_recipes, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = read_json(out)["rows"]
    assert [row["run"] for row in rows] == runs
    assert [row["ratio"] for row in rows].count(None) == alone
    for row in rows:
        assert row["num_steps"] == 45_000 // 128 * 500
        assert row["training_s"] == pytest.approx(row["num_steps"] * row["step_s"]["median"])
    assert recipes_markdown(read_json(out)) in done.output


def test_what_was_measured_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the first recipe's rows, and says with what they were measured."""

    def rows(recipe: Recipe, *_arguments: object) -> list[dict[str, str]]:
        if recipe.name == "svhn":
            raise KeyboardInterrupt
        return [{"recipe": recipe.name}]

    monkeypatch.setattr("benchmarks.recipes._rows", rows)
    out = tmp_path / "recipes.json"
    names = [word for name in ("cifar10", "svhn") for word in ("--recipe", name)]
    assert CliRunner().invoke(measure_recipes, ["--out", str(out), *names]).exit_code != 0
    assert read_json(out)["rows"] == [{"recipe": "cifar10"}]
    assert {"date", "hardware", "compute", "torch"} < set(read_json(out))


def test_the_costs_in_the_docs_are_those_measured() -> None:
    assert recipes_markdown(read_json(RECIPES_PATH)) in (ROOT / "docs" / "recipes.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code"), [((), 2), (("nosuch",), 1), (("nosuch", "0"), 2), (("nosuch", "abc"), 2)]
)
def test_the_uncertainty_benchmark_that_is_called_wrong(arguments: tuple[str, ...], code: int) -> None:
    result = CliRunner().invoke(uncertainty.main, arguments)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)

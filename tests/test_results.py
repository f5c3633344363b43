"""docs/results.md against the files that the runs left."""

import csv
from pathlib import Path
from statistics import mean

from conftest import ROOT

from sdpipe.report.write import write_report

FOLDER = ROOT / "docs" / "results" / "pictures-20-56"
TEXT = (ROOT / "docs" / "results.md").read_text()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_committed_runs_give_the_committed_tables_and_pictures(tmp_path: Path) -> None:
    """To the byte."""
    assert write_report((FOLDER,), tmp_path / "report") == []
    for name in ("runs", "history", "ensemble", "table1", "table2"):
        again, committed = tmp_path / "report" / f"{name}.csv", FOLDER / f"{name}.csv"
        assert again.read_text() == committed.read_text(), name
    for name in ("curves-56", "gradient-20"):
        figure, _, depth = name.partition("-")
        again = tmp_path / "report" / f"{figure}-imagefolder-cifar10-classes-{depth}-layers.png"
        assert again.read_bytes() == (FOLDER.parent / f"{name}.png").read_bytes(), name


def test_errors_and_times_in_the_text_are_those_of_the_tables() -> None:
    """Each row of tables 1 and 2 as the text has it."""
    for row in rows(FOLDER / "table1.csv"):
        value = {name: float(row[name]) * 100 for name in row if "error_" in name or name == "difference"}
        line = "| {} | {:.2f} ± {:.2f} | {:.2f} ± {:.2f} | {:+.2f} |".format(
            row["depth"],
            value["constant_error_mean"],
            value["constant_error_sd"],
            value["compared_error_mean"],
            value["compared_error_sd"],
            value["difference"],
        )
        assert line in TEXT
    for row in rows(FOLDER / "table2.csv"):
        times = [
            float(row[f"{kind}_s_{what}"]) for kind in ("constant", "compared") for what in ("mean", "sd")
        ]
        line = "| {} | {:.1f} ± {:.1f} | {:.1f} ± {:.1f} | {:.1f} % |".format(
            row["depth"], *times, 100 * float(row["saving"])
        )
        assert line in TEXT


def test_gradients_in_the_text_are_those_of_the_histories() -> None:
    history = rows(FOLDER / "history.csv")
    for depth in (20, 56):
        for first, last in ((1, 10), (16, 20)):
            found = [
                1000
                * mean(
                    float(row["mean_abs_grad"])
                    for row in history
                    if row["run"].startswith(f"d{depth}-{p_L}-") and first <= float(row["epoch"]) <= last
                )
                for p_L in ("p100", "p50")
            ]
            assert f"| {depth} | {first} to {last} | {found[0]:.2f} | {found[1]:.2f} |" in TEXT


def test_the_ensemble_in_the_text_is_that_of_the_file() -> None:
    ensemble = rows(FOLDER / "ensemble.csv")
    for depth in (20, 56):
        of_depth = [row for row in ensemble if row["run"].startswith(f"d{depth}-")]
        errors = [
            100 * mean(float(row["ensemble_error"]) for row in of_depth if row["members"] == members)
            for members in ("1", "4", "16")
        ]
        errors.append(100 * mean(float(row["test_network_error"]) for row in of_depth))
        assert f"| {depth} | {' | '.join(f'{error:.2f}' for error in errors)} |" in TEXT


def test_active_blocks_in_the_text_are_those_of_the_runs() -> None:
    """E(L~) = (3L - 1) / 4 (SD section 3): 26 / 4 of 9 blocks and 80 / 4 of 27."""
    expected = {row["run"]: float(row["expected_depth"]) for row in rows(FOLDER / "runs.csv")}
    assert (expected["d20-p50-s0"], expected["d56-p50-s0"]) == (26 / 4, 80 / 4)
    skipped = [f"{100 * (1 - active / num):.0f}" for active, num in ((26 / 4, 9), (80 / 4, 27))]
    assert f"6.5 of 9 and 20 of 27 are active, so {skipped[0]} and {skipped[1]} %" in TEXT

"""The implicit ensemble against an enumeration of all sub-networks."""

import errno
import os
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_dataset, make_weights, random_images
from ensemble_files import in_pytorch

from sdpipe.cli import main
from sdpipe.commands.runs import _for_each_run
from sdpipe.deploy import ensemble
from sdpipe.deploy.ensemble import compare_ensemble, ensemble_probabilities
from sdpipe.errors import DataError, ModelError
from sdpipe.runtime.uncertainty import draw_members
from sdpipe.training.run_files import read_rows
from sdpipe.training.weights import Weights, save_weights


@pytest.mark.slow
def test_the_average_of_many_is_that_over_all_sub_networks() -> None:
    """8 layers have 3 blocks and 2^3 sub-networks, with survival 5/6, 4/6, 3/6 at p_L 0.5.

    2,000 draws of a probability have a standard error of at most 0.5 / sqrt(2000) = 0.011.
    """
    weights = make_weights(depth=8)
    images_NHWC = random_images(5)
    network = weights.build_network().double()
    normalised = (torch.from_numpy(images_NHWC).double() - weights.normalisation.mean_HWC) / 60
    expected_NK = np.zeros((5, 3))
    with torch.inference_mode():
        for active in product([True, False], repeat=3):
            chance = np.prod([p if b else 1 - p for p, b in zip((5 / 6, 4 / 6, 3 / 6), active, strict=True)])
            logits_NK = network(normalised.permute(0, 3, 1, 2), active)
            expected_NK += chance * logits_NK.softmax(dim=1).numpy()
        tested = network(normalised.permute(0, 3, 1, 2)).softmax(dim=1).numpy()
    tested_NK, averaged = ensemble_probabilities(weights, images_NHWC, [2000], seed=0)
    np.testing.assert_allclose(averaged[2000], expected_NK, atol=0.045)
    np.testing.assert_allclose(tested_NK, tested, atol=1e-5)


def test_the_members_of_few_are_the_first_of_many() -> None:
    probs = [0.9, 0.5, 0.1]
    assert draw_members(probs, 16, seed=3)[:4] == draw_members(probs, 4, seed=3)
    assert draw_members(probs, 16, seed=3) != draw_members(probs, 16, seed=4)
    share_L = np.mean(draw_members(probs, 4000, seed=0), axis=0)
    np.testing.assert_allclose(share_L, probs, atol=0.03)  # 4 standard errors of sqrt(0.25 / 4000)


def member_probabilities(
    weights: Weights, images_NHWC: np.ndarray, num_members: int, seed: int = 0
) -> np.ndarray:
    """Of each sub-network by itself, float64 (M, N, K)."""
    members = draw_members(weights.info.network.survival_probs, num_members, seed)
    logits_MNK = np.stack([in_pytorch(weights, images_NHWC, active) for active in members])
    return torch.from_numpy(logits_MNK).softmax(dim=2).numpy()


@pytest.mark.parametrize("seed", [0, 3])
def test_the_first_members_are_averaged(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """M = 1 is the sub-network itself, M = 4 the mean of four, both at once, and whatever the batch size."""
    weights, images_NHWC = make_weights(depth=20), random_images(7)
    (active,) = draw_members(weights.info.network.survival_probs, 1, seed)
    assert not all(active), "a sub-network that is not the whole one"
    probabilities_MNK = member_probabilities(weights, images_NHWC, 4, seed)
    for batch in (2, 100):
        monkeypatch.setattr(ensemble, "BATCH", batch)
        _, averaged = ensemble_probabilities(weights, images_NHWC, [1, 4], seed)
        assert list(averaged) == [1, 4]
        for count, averaged_NK in averaged.items():
            np.testing.assert_allclose(averaged_NK, probabilities_MNK[:count].mean(axis=0), atol=1e-5)


def test_command_writes_a_file_for_the_report(project: Path) -> None:
    """Runs of constant depth, which each recipe has, are named and passed over: no failure, unless asked for.

    The others are compared in either case, as in float64.
    """
    dataset = make_dataset(project / "data" / "animals")
    for run, p_L in (("constant", 1.0), ("stochastic", 0.5)):
        weights = make_weights(p_L=p_L, seed=7)  # its test network errs less than its sub-networks
        object.__setattr__(weights.info, "dataset_digest", dataset.digest)
        (project / "models" / run).mkdir(parents=True)
        save_weights(project / "models" / run / "weights.safetensors", weights)
    command = ["ensemble", "--members", "1,4"]
    for asked, status in (([], 0), (["models/constant", "models/stochastic"], 1)):
        result = CliRunner().invoke(main, [*command, *asked])
        assert result.exit_code == status
        assert "models/constant: constant depth has no sub-networks" in result.output
        assert ("error:" in result.output) == (status == 1)
        assert "M = 4" in result.output
    path = project / "models" / "stochastic" / "ensemble.csv"
    header = path.read_text().splitlines()[0]
    assert header == ",".join(ensemble.COLUMNS)
    path.write_text("".join(line.split(",", 1)[1] for line in path.read_text().splitlines(keepends=True)))
    rows = read_rows(path)
    assert [(row["members"], row["seed"]) for row in rows] == [(1, 0), (4, 0)]
    images_NHWC, labels_N = dataset.test_images_NHWC, torch.from_numpy(dataset.test_labels_N)
    tested_NK = torch.from_numpy(in_pytorch(weights, images_NHWC, None)).softmax(dim=1)
    members_MNK = torch.from_numpy(member_probabilities(weights, images_NHWC, 4))
    for row in rows:
        averaged_NK = members_MNK[: int(row["members"])].mean(dim=0)
        for name, probabilities_NK in (("ensemble", averaged_NK), ("test_network", tested_NK)):
            wrong_N = probabilities_NK.argmax(dim=1) != labels_N
            assert row[f"{name}_error"] == wrong_N.double().mean().item()
            nll = torch.nn.functional.nll_loss(probabilities_NK.log(), labels_N).item()
            assert row[f"{name}_nll"] == pytest.approx(nll, rel=1e-4)
    assert not (project / "models" / "constant" / "ensemble.csv").exists()


def test_a_run_that_the_system_refuses_leaves_the_others_to_be_done(project: Path) -> None:
    """As one that sdpipe refuses: a line names it, and the next run has its file."""
    dataset, weights = make_dataset(project / "data" / "animals"), make_weights(depth=8)
    object.__setattr__(weights.info, "dataset_digest", dataset.digest)
    for run in ("a", "b"):
        (project / "models" / run).mkdir(parents=True)
        save_weights(project / "models" / run / "weights.safetensors", weights)
    (project / "models" / "a" / "ensemble.csv").mkdir()
    result = CliRunner().invoke(main, ["ensemble", "--members", "1"])
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if "models/a/ensemble.csv" in line], result.stderr
    assert (project / "models" / "b" / "ensemble.csv").is_file()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EBADF, os.strerror(errno.EBADF))])
def test_runs_end_where_nobody_reads_what_they_print_and_at_a_bug(error: OSError) -> None:
    """Each may take an hour, and none of the others is asked for any more."""
    begun: list[Path] = []

    def work(folder: Path) -> None:
        begun.append(folder)
        raise error

    with pytest.raises(type(error)):
        _for_each_run((Path("a"), Path("b")), "ensemble", lambda: work)
    assert begun == [Path("a")]


def test_other_data_and_bad_members_and_seeds_are_refused(project: Path) -> None:
    folder = project / "models" / "run"
    folder.mkdir(parents=True)
    save_weights(folder / "weights.safetensors", make_weights())
    with pytest.raises(DataError, match="was trained on the data dddd"):
        compare_ensemble(folder, make_dataset(project / "data" / "animals"), [1], 0)
    shutil.rmtree(folder)
    with pytest.raises(ModelError, match=r"weights\.safetensors"):
        compare_ensemble(folder, make_dataset(project / "data" / "other"), [1], 0)
    for members in ("0", "a", "1,,2", "-1"):
        assert CliRunner().invoke(main, ["ensemble", "--members", members]).exit_code == 2, members
    assert CliRunner().invoke(main, ["ensemble", "--seed", str(2**32)]).exit_code == 2

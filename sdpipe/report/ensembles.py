"""The implicit ensemble: averages of sampled sub-networks against the test network."""

from collections.abc import Iterable, Sequence

from sdpipe.colours import compared_colours
from sdpipe.report.plan import Drawing, NotDrawn, caption
from sdpipe.report.plots import EnsembleLine, draw_ensemble
from sdpipe.report.runs import Run
from sdpipe.report.settings import PAPERS_KIND, Arm, Setting, Spread, size_mark, spread


def ensemble_figures(settings: Iterable[Setting]) -> list[Drawing]:
    """The implicit ensemble: for each setting with ensembles of stochastic runs."""
    drawings = []
    for setting in settings:
        arms = [arm for arm in setting.stochastic if _members_of_all(arm)]
        if arms:
            drawings.append(_ensemble(setting, arms))
    return drawings


def _ensemble(setting: Setting, arms: Sequence[Arm]) -> Drawing:
    runs = [run for arm in arms for run in arm.runs if run.ensemble]
    lines = [_ensemble_line(*line) for line in zip(arms, compared_colours(len(arms)), strict=True)]
    return Drawing(
        number="Ensemble",
        name=f"ensemble-{setting.slug}",
        title=f"Sampled sub-networks against the test network: {setting.label}",
        caption=caption(
            "The implicit ensemble of the paper's section 3. Solid: the softmax average of sampled "
            "sub-networks; dashed: the test network of equation 5. Error bars: one standard deviation over "
            f"runs. Runs: {len(runs)}. Each point is of all runs of its line.",
            _seeds(runs),
        ),
        mark=size_mark(runs),
        draw=lambda sheet: draw_ensemble(sheet, lines),
    )


def _seeds(runs: Iterable[Run]) -> str:
    seeds = sorted({row["seed"] for run in runs for row in run.ensemble if "seed" in row})
    named = ", ".join(map(str, seeds))
    return f"The sub-networks were drawn with different seeds: {named}." if len(seeds) > 1 else ""


def ensembles_not_drawn(settings: Iterable[Setting]) -> list[NotDrawn]:
    """Why there is no figure of ensembles, or a training is in none."""
    trainings = [(setting, arm) for setting in settings for arm in setting.stochastic]
    with_ensemble = [(setting, arm) for setting, arm in trainings if any(run.ensemble for run in arm.runs)]
    if not with_ensemble:
        return [_not_drawn("", "a stochastic run with an ensemble.csv of its own weights")]
    return [
        _not_drawn(
            f", {setting.label}, {arm.name}",
            "a number of sub-networks that the ensembles of all its runs have",
        )
        for setting, arm in with_ensemble
        if not _members_of_all(arm)
    ]


def _not_drawn(of: str, missing: str) -> NotDrawn:
    return NotDrawn(
        number="Ensemble",
        title=f"sampled sub-networks against the test network{of}",
        missing=missing,
        commands=("sdpipe ensemble models/RUN",),
    )


def _members_of_all(arm: Arm) -> list[float]:
    """The numbers of sub-networks that all its runs with an ensemble have."""
    counts = [{row["members"] for row in run.ensemble} for run in arm.runs if run.ensemble]
    return sorted(set.intersection(*counts)) if counts else []


def _ensemble_line(arm: Arm, colour: str) -> EnsembleLine:
    found = [run.ensemble for run in arm.runs if run.ensemble]
    rows = [row for ensemble in found for row in ensemble]
    members = _members_of_all(arm)

    def by_members(column: str) -> dict[float, Spread]:
        return {count: spread(row[column] for row in rows if row["members"] == count) for count in members}

    return EnsembleLine(
        name=f"p_L {arm.p_L:g}" if arm.kind == PAPERS_KIND._replace(p_L=arm.p_L) else arm.name,
        colour=colour,
        errors=by_members("ensemble_error"),
        test_network_error=spread(ensemble[0]["test_network_error"] for ensemble in found).mean,
        nlls=by_members("ensemble_nll"),
        test_network_nll=spread(ensemble[0]["test_network_nll"] for ensemble in found).mean,
    )

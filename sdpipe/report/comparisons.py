"""Figures that compare trainings of many depths and p_L: the paper's figures 5 and 8."""

from collections.abc import Iterable, Mapping, Sequence

from sdpipe.report.labels import slug
from sdpipe.report.plan import Drawing, caption, repeated_seeds
from sdpipe.report.plots import draw_bars, draw_heatmap, draw_p_L
from sdpipe.report.runs import Run
from sdpipe.report.settings import Arm, Kind, Setting, Spread, key_of, size_mark

_PAIR_OF_FIGURE_5 = {"cifar10", "cifar10-1202"}  # whose schedules differ


def group_by_all_but(settings: Iterable[Setting], *parameters: str) -> list[list[Setting]]:
    """Settings that share everything but these parameters."""
    groups: dict[frozenset[object], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(frozenset(key_of(setting.runs[0], parameters)), []).append(setting)
    return list(groups.values())


def depth_figures(settings: Sequence[Setting]) -> list[Drawing]:
    """Figure 5: bars for two or more depths."""
    groups = group_by_all_but(settings, "depth")
    groups.append([one for one in settings if {run.recipe for run in one.runs} & _PAIR_OF_FIGURE_5])
    compared: list[tuple[list[Setting], Kind]] = []  # each once, though a group may hold it, too
    for group in groups:
        # Beside one constant depth only: its dropout is the least that a setting has.
        kinds = {(one.constant.dropout, arm.kind) for one in group if one.constant for arm in one.compared}
        for dropout, kind in sorted(kinds):
            found = [setting for setting in of_dropout(group, dropout) if _arm(setting, kind)]
            if len({setting.get("depth") for setting in found}) > 1 and (found, kind) not in compared:
                compared.append((found, kind))
    return [_bars(found, kind) for found, kind in compared]


def of_dropout(settings: Iterable[Setting], dropout: float) -> list[Setting]:
    """Those whose constant depth has this much."""
    return [one for one in settings if one.constant and one.constant.dropout == dropout]


def _arm(setting: Setting, kind: Kind) -> Arm | None:
    return next((arm for arm in setting.arms if arm.kind == kind), None)


def common_label(settings: Sequence[Setting]) -> str:
    """What the labels share, with all depths."""
    parts = [setting.label.split(", ") for setting in settings]
    shared = [part for part in parts[0] if all(part in other for other in parts)]
    kept = [part for part in shared if not part.endswith(" layers")]
    *depths, deepest = map(str, sorted({setting.get("depth") for setting in settings}))
    others = f"{', '.join(depths)} and " if depths else ""
    return ", ".join([*kept, f"{others}{deepest} layers"])


def _bars(settings: Sequence[Setting], kind: Kind) -> Drawing:
    ordered = sorted(settings, key=lambda setting: int(setting.get("depth")))
    pairs = [(setting.constant, _arm(setting, kind)) for setting in ordered]
    arms = [arm for pair in pairs for arm in pair if arm]
    bars = {
        "constant depth": [constant.spread_of(_test_error) if constant else None for constant, _ in pairs],
        kind.name: [arm.spread_of(_test_error) if arm else None for _, arm in pairs],
    }
    return Drawing(
        number="Figure 5",
        name=f"depths-{slug(f'{common_label(ordered)} {kind.name}')}",
        title=f"Test error by depth: {common_label(ordered)}",
        caption=caption(
            "As the paper's figure 5, which shows 110 and 1202 layers.",
            "Error bars: one standard deviation over seeds.",
            f"Runs, from left to right: {', '.join(str(len(arm.runs)) for arm in arms)}.",
            repeated_seeds(arms),
        ),
        mark=size_mark(_runs(arms)),
        draw=lambda sheet: draw_bars(sheet, [setting.get("depth") for setting in ordered], bars),
    )


def _test_error(run: Run) -> float:
    return run.test_error


def _runs(arms: Iterable[Arm]) -> list[Run]:
    return [run for arm in arms for run in arm.runs]


def p_L_figures(settings: Iterable[Setting]) -> list[Drawing]:
    """Figure 8 left: for each setting with two values of p_L below 1."""
    drawings = []
    for setting in settings:
        lines: dict[str, dict[float, Spread]] = {}
        for arm in setting.stochastic:
            name = arm.kind.rule.replace("_", " ") + arm.kind.extras
            lines.setdefault(name, {})[arm.p_L] = arm.spread_of(_test_error)
        if len({arm.p_L for arm in setting.stochastic}) > 1:
            drawings.append(_p_L(setting, lines))
    return drawings


def _p_L(setting: Setting, lines: dict[str, dict[float, Spread]]) -> Drawing:
    constant = setting.constant.spread_of(_test_error) if setting.constant else None
    return Drawing(
        number="Figure 8 left",
        name=f"p_L-{setting.slug}",
        title=f"Test error against p_L: {setting.label}",
        caption=caption(
            "As the paper's figure 8 left. Error bars and the band: one standard deviation over seeds.",
            _runs_of_points(
                {name: [points[p_L] for p_L in sorted(points)] for name, points in lines.items()}
            ),
            f"Runs at constant depth: {constant.n}."
            if constant
            else "There is no constant-depth run of this setting.",
            repeated_seeds(filter(None, (setting.constant, *setting.stochastic))),
        ),
        mark=size_mark(setting.runs),
        draw=lambda sheet: draw_p_L(sheet, lines, constant),
    )


def _runs_of_points(points: Mapping[str, Sequence[Spread]]) -> str:
    """How many runs are behind each point of a row, from left to right; once, if all are of as many."""
    counts = {name: [found.n for found in spreads] for name, spreads in points.items()}
    if len({count for row in counts.values() for count in row}) == 1:
        return f"Runs at each point: {next(iter(counts.values()))[0]}."
    rows = (f"{name} {', '.join(map(str, row))}" for name, row in counts.items())
    return f"Runs at each point, from left to right: {'; '.join(rows)}."


def heatmap_figures(settings: Iterable[Setting]) -> list[Drawing]:
    """Figure 8 right: for each way to drop with two depths and two values of p_L."""
    drawings = []
    for group in group_by_all_but(settings, "depth"):
        # Constant depth is the heatmap's row of p_L 1, whatever else its blocks would be dropped by.
        kinds = {arm.kind._replace(p_L=1) for setting in group for arm in setting.stochastic}
        for kind in sorted(kinds):
            cells = {
                (arm.p_L, int(setting.get("depth"))): arm
                for setting in group
                for arm in setting.arms
                if arm.kind._replace(p_L=1) == kind or (arm.p_L == 1 and arm.dropout == kind.dropout)
            }
            depths = {depth for p_L, depth in cells if p_L < 1}
            if min(len({p_L for p_L, _ in cells}), len(depths)) > 1:
                how = kind.rule.replace("_", " ") + kind.extras
                drawings.append(_heatmap(group, cells, how))
    return drawings


def _heatmap(group: Sequence[Setting], cells: dict[tuple[float, int], Arm], how: str) -> Drawing:
    p_Ls = sorted({p_L for p_L, _ in cells}, reverse=True)
    depths = sorted({depth for _, depth in cells})
    errors = {cell: arm.spread_of(_test_error) for cell, arm in cells.items()}
    return Drawing(
        number="Figure 8 right",
        name=f"p_L-depth-{slug(f'{common_label(group)} {how}')}",
        title=f"Test error (%) over p_L and depth, {how}: {common_label(group)}",
        caption=caption(
            "As the paper's figure 8 right: mean over seeds, with one standard deviation.",
            _runs_of_points(
                {
                    f"p_L {p_L:g}": [errors[p_L, depth] for depth in depths if (p_L, depth) in errors]
                    for p_L in p_Ls
                }
            ),
            repeated_seeds(cells.values()),
        ),
        mark=size_mark(_runs(cells.values())),
        draw=lambda sheet: draw_heatmap(sheet, p_Ls, depths, errors),
    )

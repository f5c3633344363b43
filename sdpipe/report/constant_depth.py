"""What the ResNet paper compares, at constant depth: plain nets, skips of options A, B and C, and depths."""

from collections.abc import Collection, Iterable, Iterator, Sequence

from sdpipe.colours import CONSTANT_COLOUR, compared_colours
from sdpipe.report.comparisons import common_label, group_by_all_but, of_dropout
from sdpipe.report.labels import slug
from sdpipe.report.plan import Drawing, caption, line_of, repeated_seeds
from sdpipe.report.plots import draw_bars, draw_curves, draw_degradation
from sdpipe.report.runs import Run
from sdpipe.report.settings import Arm, Setting, size_mark

_SERIES = 3  # depths that make one
_CURVES = "Thin: each run; bold: their mean; dotted: the learning rate of all changes."


def constant_depth_figures(settings: Sequence[Setting]) -> list[Drawing]:
    """All of them that the runs suffice for."""
    return [
        *(_degradation(*nets) for nets in _degradation_groups(settings)),
        *map(_skips, _groups_of_skips(settings)),
        *map(_depths, _groups_of_depths(settings)),
    ]


def with_other_skips(settings: Sequence[Setting]) -> list[Setting]:
    """Those that stand beside others which share all but the skip, each once."""
    groups = [[*plain, *residual] for plain, residual in _degradation_groups(settings)]
    groups += _groups_of_skips(settings)
    return list({setting.label: setting for group in groups for setting in group}.values())


def _groups(settings: Iterable[Setting], *parameters: str) -> Iterator[list[Setting]]:
    """With a constant depth, of one dropout, that share all but these parameters; by depth, plain first."""
    for group in group_by_all_but(settings, *parameters):
        for dropout in sorted({one.constant.dropout for one in group if one.constant}):
            yield sorted(of_dropout(group, dropout), key=_order)


def _order(setting: Setting) -> tuple[int, bool, str]:
    return setting.get("depth"), setting.get("skip") != "plain", setting.get("skip")


def _constants(settings: Iterable[Setting]) -> list[Arm]:
    return [setting.constant for setting in settings if setting.constant]


def _degradation_groups(settings: Iterable[Setting]) -> list[tuple[list[Setting], list[Setting]]]:
    """Plain and residual settings, of the depths of both; a pair for each option of skips."""
    return [pair for group in _groups(settings, "skip", "depth") for pair in _pairs(group)]


def _pairs(group: Iterable[Setting]) -> Iterable[tuple[list[Setting], list[Setting]]]:
    by_skip: dict[str, list[Setting]] = {}
    for setting in group:
        by_skip.setdefault(setting.get("skip"), []).append(setting)
    plain = by_skip.pop("plain", [])
    for residual in by_skip.values():
        depths = {one.get("depth") for one in plain} & {one.get("depth") for one in residual}
        if len(depths) > 1:
            yield _of_depths(plain, depths), _of_depths(residual, depths)


def _of_depths(settings: Iterable[Setting], depths: Collection[int]) -> list[Setting]:
    return [setting for setting in settings if setting.get("depth") in depths]


def _groups_of_skips(settings: Iterable[Setting]) -> list[list[Setting]]:
    """Of one depth with two of the options or more, and the plain net."""
    groups = _groups(settings, "skip")
    return [group for group in groups if len({one.get("skip") for one in group} - {"plain"}) > 1]


def _groups_of_depths(settings: Iterable[Setting]) -> list[list[Setting]]:
    return [group for group in _groups(settings, "depth") if len(group) >= _SERIES]


def _degradation(plain: Sequence[Setting], residual: Sequence[Setting]) -> Drawing:
    skip = residual[0].get("skip")
    alike = "1 and 4" if residual[0].get("family") == "imagenet" else "1 and 6"
    depths = sorted({setting.get("depth") for setting in (*plain, *residual)})
    colours = dict(zip(depths, [CONSTANT_COLOUR, *compared_colours(len(depths) - 1)], strict=True))
    columns = {
        name: [
            line_of(arm, f"{arm.runs[0].params['depth']} layers", colours[arm.runs[0].params["depth"]])
            for arm in _constants(found)
        ]
        for name, found in (("plain", plain), (f"residual, skips of option {skip}", residual))
    }
    shared = common_label([*plain, *residual])
    return Drawing(
        number="Degradation",
        name=f"degradation-{slug(f'{shared} skip {skip}')}",
        title=f"Plain nets against residual ones with skips of option {skip}, constant depth: {shared}",
        caption=f"As figures {alike} of the ResNet paper, with the training loss in place of the training "
        f"error. {_CURVES}",
        mark=size_mark(_runs((*plain, *residual))),
        draw=lambda sheet: draw_degradation(sheet, columns),
    )


def _runs(settings: Iterable[Setting]) -> list[Run]:
    return [run for arm in _constants(settings) for run in arm.runs]


def _skips(group: Sequence[Setting]) -> Drawing:
    colours = [CONSTANT_COLOUR, *compared_colours(len(group) - 1)]
    lines = [
        line_of(arm, _skip_name(arm), colour) for arm, colour in zip(_constants(group), colours, strict=True)
    ]
    return Drawing(
        number="Skips",
        name=f"skips-{slug(common_label(group))}",
        title=f"Options of skips, constant depth: {common_label(group)}",
        caption=f"What table 3 of the ResNet paper compares. Dots: the lowest validation error of each run. "
        f"{_CURVES}",
        mark=size_mark(_runs(group)),
        draw=lambda sheet: draw_curves(sheet, lines),
    )


def _skip_name(arm: Arm) -> str:
    skip = arm.runs[0].params["skip"]
    return "plain" if skip == "plain" else f"option {skip}"


def _depths(group: Sequence[Setting]) -> Drawing:
    arms = _constants(group)
    bars = {"constant depth": [arm.spread_of(lambda run: run.test_error) for arm in arms]}
    return Drawing(
        number="Depths",
        name=f"depths-{slug(f'{common_label(group)} constant depth')}",
        title=f"Test error by depth, constant depth: {common_label(group)}",
        caption=caption(
            "What table 6 of the ResNet paper compares. Error bars: one standard deviation over seeds.",
            f"Runs, from left to right: {', '.join(str(len(arm.runs)) for arm in arms)}.",
            repeated_seeds(arms),
        ),
        mark=size_mark(_runs(group)),
        draw=lambda sheet: draw_bars(sheet, [setting.get("depth") for setting in group], bars),
    )

"""Plain nets against residual ones at constant depth: ResNet's figures 1, 4 and 6."""

from collections.abc import Collection, Iterable, Sequence

from sdpipe.report.colours import CONSTANT_COLOUR, compared_colours
from sdpipe.report.comparisons import common_label, group_by_all_but, of_dropout
from sdpipe.report.labels import slug
from sdpipe.report.plan import Drawing, line_of
from sdpipe.report.plots import draw_degradation
from sdpipe.report.settings import Setting, size_mark


def degradation_groups(settings: Iterable[Setting]) -> list[tuple[list[Setting], list[Setting]]]:
    """Plain and residual settings at constant depth that share all but the skip, of the depths of both."""
    found: list[tuple[list[Setting], list[Setting]]] = []
    for group in group_by_all_but(settings, "skip", "depth"):
        for dropout in sorted({one.constant.dropout for one in group if one.constant}):
            found += _degradation_groups(of_dropout(group, dropout))
    return found


def _degradation_groups(group: Iterable[Setting]) -> Iterable[tuple[list[Setting], list[Setting]]]:
    by_skip: dict[str, list[Setting]] = {}
    for setting in sorted(group, key=lambda setting: int(setting.get("depth"))):
        by_skip.setdefault(setting.get("skip"), []).append(setting)
    plain = by_skip.pop("plain", [])
    for residual in by_skip.values():
        depths = {one.get("depth") for one in plain} & {one.get("depth") for one in residual}
        if len(depths) > 1:
            yield _of_depths(plain, depths), _of_depths(residual, depths)


def _of_depths(settings: Iterable[Setting], depths: Collection[int]) -> list[Setting]:
    return [setting for setting in settings if setting.get("depth") in depths]


def degradation_figures(settings: Iterable[Setting]) -> list[Drawing]:
    """ResNet's figures 1, 4 and 6: deeper plain nets get worse, deeper residual ones do not."""
    return [_degradation(plain, residual) for plain, residual in degradation_groups(settings)]


def _degradation(plain: Sequence[Setting], residual: Sequence[Setting]) -> Drawing:
    skip = residual[0].get("skip")
    alike = "1 and 4" if residual[0].get("family") == "imagenet" else "1 and 6"
    depths = sorted({setting.get("depth") for setting in (*plain, *residual)})
    colours = dict(zip(depths, [CONSTANT_COLOUR, *compared_colours(len(depths) - 1)], strict=True))
    columns = {
        name: [
            line_of(
                setting.constant,
                f"{setting.get('depth')} layers",
                colours[setting.get("depth")],
            )
            for setting in found
            if setting.constant
        ]
        for name, found in (("plain", plain), (f"residual, skips of option {skip}", residual))
    }
    return Drawing(
        number="Degradation",
        name=f"degradation-{slug(f'{common_label(residual)} skip {skip}')}",
        title=f"Plain against residual nets, constant depth: {common_label(residual)}",
        caption=f"As figures {alike} of the ResNet paper, with the training loss in place of the training "
        "error. Thin: each run; bold: their mean; dotted: the learning rate of all changes.",
        mark=size_mark(run for one in (*plain, *residual) if one.constant for run in one.constant.runs),
        draw=lambda sheet: draw_degradation(sheet, columns),
    )

"""Which figures the runs suffice for, with captions, and what is missing for the others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count

from sdpipe.report.comparisons import depth_figures, heatmap_figures, p_L_figures
from sdpipe.report.constant_depth import constant_depth_figures
from sdpipe.report.ensembles import ensemble_figures, ensembles_not_drawn
from sdpipe.report.plan import Drawing, NotDrawn, arm_lines, caption
from sdpipe.report.plots import draw_curves, draw_gradient
from sdpipe.report.settings import Arm, Setting, size_mark

_IN_FIGURE_4 = 1202  # layers

# The figure, what it shows, what runs it needs, and the recipes of which each alone makes them. The twins of
# those for figures 3 and 4 do not: they have other data, and fewer layers.
_WANTED = (
    (
        "Figure 3",
        "curves on CIFAR-10 or CIFAR-100",
        "a run on CIFAR-10 or CIFAR-100 with augmentation",
        ("cifar10", "cifar100"),
    ),
    (
        "Figure 4",
        "curves on SVHN, and of 1202 layers",
        "a run on SVHN, or on CIFAR-10 of 1202 layers with augmentation",
        ("svhn", "cifar10-1202"),
    ),
    (
        "Figure 6",
        "curves on ImageNet",
        "a run of an ImageNet-style net (`family: imagenet`)",
        ("imagenet-small", "imagenet"),
    ),
    (
        "Figure 5",
        "test error at several depths",
        "constant and stochastic runs at two depths that share all else, or of both cifar10 and cifar10-1202",
        ("figure8-right-small", "figure8-right"),
    ),
    (
        "Figure 7",
        "gradient magnitude",
        "a constant and a stochastic run of one setting",
        ("cifar10-small", "cifar10"),
    ),
    (
        "Figure 8 left",
        "test error against p_L",
        "runs of one setting at two values of p_L below 1 or more",
        ("figure8-left-small", "figure8-left"),
    ),
    (
        "Figure 8 right",
        "test error over p_L and depth",
        "runs at two depths and two values of p_L that share all else",
        ("figure8-right-small", "figure8-right"),
    ),
    (
        "Degradation",
        "plain against residual nets",
        "constant-depth runs with `skip: plain` and with skips, each at two depths",
        ("degradation-small", "degradation"),
    ),
    (
        "Skips",
        "options A, B and C",
        "constant-depth runs with two of `skip: A`, `B` and `C` that share all else",
        ("skips-small", "skips"),
    ),
    (
        "Depths",
        "test error at constant depth by depth",
        "constant-depth runs at three depths that share all else",
        ("depths-small", "depths"),
    ),
)


def plan_figures(settings: Sequence[Setting]) -> tuple[list[Drawing], list[NotDrawn]]:
    """The figures to draw, in the paper's order, and those for which the runs do not suffice."""
    drawings = [_curves(setting) for setting in settings]
    drawings += depth_figures(settings)
    drawings += [_gradient(setting) for setting in settings if setting.constant and setting.stochastic]
    drawings += p_L_figures(settings)
    drawings += heatmap_figures(settings)
    drawings += constant_depth_figures(settings)
    drawings += ensemble_figures(settings)
    return list(_named_apart(drawings)), [*_not_drawn(drawings), *ensembles_not_drawn(settings)]


def _named_apart(drawings: Iterable[Drawing]) -> Iterator[Drawing]:
    """With a number behind a name that another figure has: what differs may be no letter of it."""
    taken: set[str] = set()
    for drawing in drawings:
        names = chain([drawing.name], (f"{drawing.name}-{number}" for number in count(2)))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        yield replace(drawing, name=name)


def _not_drawn(drawings: Iterable[Drawing]) -> list[NotDrawn]:
    drawn = {drawing.number for drawing in drawings}
    return [
        NotDrawn(
            number=number,
            title=title,
            missing=needs,
            commands=tuple(f"sdpipe recipe use {name}" for name in recipes),
        )
        for number, title, needs, recipes in _WANTED
        if number not in drawn
    ]


def _shown(setting: Setting) -> list[Arm]:
    """Constant depth, dropout, and of stochastic depth what is most like the paper's, drawn in either way."""
    alike = [(arm.kind.p_L, arm.kind.rule) for arm in setting.stochastic[:1]]
    return [arm for arm in setting.arms if arm.p_L == 1 or (arm.kind.p_L, arm.kind.rule) in alike]


def _left_out(setting: Setting) -> str:
    names = [arm.name for arm in setting.arms if arm not in _shown(setting)]
    return f"Not shown here: {'; '.join(names)}." if names else ""


def _curves(setting: Setting) -> Drawing:
    arms = _shown(setting)
    number, alike = _curve_figure(setting)
    lacks = "" if setting.constant and setting.stochastic else _lacking(setting)
    return Drawing(
        number=number,
        name=f"curves-{setting.slug}",
        title=f"Validation error and training loss: {setting.label}",
        caption=caption(
            f"{alike}.",
            "The error is that on held-out validation images; the paper's figures show the test error.",
            "The training loss with stochastic depth is that of the blocks drawn in each step.",
            lacks,
            "Thin: each run; bold: their mean; dots: the lowest validation error of each run, "
            "whose weights are kept; dotted: the learning rate of all changes.",
            _left_out(setting),
        ),
        mark=size_mark(run for arm in arms for run in arm.runs),
        draw=lambda sheet: draw_curves(sheet, arm_lines(setting, arms)),
    )


def _lacking(setting: Setting) -> str:
    return f"There is no {'stochastic' if setting.constant else 'constant-depth'} run of this setting."


def _curve_figure(setting: Setting) -> tuple[str, str]:
    """The paper's figure that these curves are, and how the caption says it."""
    if setting.get("skip") == "plain":
        return "As figure 3", "As the paper's figure 3, of a plain net, which it does not have"
    alike = "Figure" if setting.runs[0].is_augmented else "As figure"
    if setting.get("depth") == _IN_FIGURE_4 and setting.pictures == "cifar10":
        unlike = _unless(setting, _IN_FIGURE_4, augmented=True)
        return f"{alike} 4", f"As the paper's figure 4{unlike}, the curves of {_IN_FIGURE_4} layers"
    if setting.pictures == "svhn":
        return "Figure 4", f"As the paper's figure 4, the curves on SVHN{_unless(setting, 152)}"
    if setting.pictures in ("cifar10", "cifar100"):
        return f"{alike} 3", f"As the paper's figure 3{_unless(setting, 110, augmented=True)}"
    if setting.get("family") == "imagenet":
        data = "" if setting.pictures == "imagenet" else ", on other data"
        return "Figure 6", f"As the paper's figure 6{_unless(setting, 152)}{data}"
    return "As figure 3", "As the paper's figure 3, on other data"


def _unless(setting: Setting, depth: int, *, augmented: bool = False) -> str:
    """What the paper's figure has that this setting has not: so many layers, augmentation."""
    lacks = [f"{depth} layers"] if setting.get("depth") != depth else []
    if augmented and not setting.runs[0].is_augmented:
        lacks.append("augmentation")
    return f", which has {' and '.join(lacks)}" if lacks else ""


def _gradient(setting: Setting) -> Drawing:
    arms = _shown(setting)
    return Drawing(
        number="Figure 7",
        name=f"gradient-{setting.slug}",
        title=f"Gradient magnitude: {setting.label}",
        caption=caption(
            "As the paper's figure 7: mean absolute gradient of the first convolution of block 1, over the "
            "steps in which that block was active. Thin: each run; bold: their mean; dotted: the learning "
            "rate of all changes.",
            _left_out(setting),
        ),
        mark=size_mark(run for arm in arms for run in arm.runs),
        draw=lambda sheet: draw_gradient(sheet, arm_lines(setting, arms)),
    )

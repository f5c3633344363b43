"""Which runs belong together: settings, seeds, trainings compared; marks of what is not the papers'."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sdpipe.recipes import NOT_OF_THE_RECIPE
from sdpipe.report.full_size import is_full_size, is_narrow, other_settings
from sdpipe.report.labels import Key, data_name, exact, labels_of, slug
from sdpipe.report.runs import Run, flatten

# What is compared within a recipe is within a setting, too; so is dropout, which tells recipes apart.
_NOT_OF_THE_SETTING = NOT_OF_THE_RECIPE | {"dropout"}
_PAPERS_RULE = "linear_decay"
_REDUCED, _OTHER = "reduced size", "other settings than the paper's"


class Kind(NamedTuple):
    """What tells the trainings of a setting apart, seeds aside: how blocks and channels are dropped."""

    p_L: float
    rule: str = _PAPERS_RULE  # "" at constant depth, where it changes nothing
    draw: str = "batch"  # the same
    dropout: float = 0.0
    p_L_warmup_epochs: int = 0  # 0 at constant depth

    @property
    def name(self) -> str:
        """`constant depth`, or `stochastic, p_L 0.5` with what is unlike the paper's main setting."""
        if self.p_L == 1:
            return f"constant depth{self.extras}"
        rule = "" if self.rule == _PAPERS_RULE else f", {self.rule.replace('_', ' ')}"
        return f"stochastic, p_L {exact(self.p_L)}{rule}{self.extras}"

    @property
    def extras(self) -> str:
        """What is unlike the paper's main setting beside p_L and rule, behind a comma."""
        warmup = self.p_L_warmup_epochs
        return "".join(
            [
                ", drawn for each image" if self.draw == "sample" else "",
                f", p_L warmed up over {warmup} epochs" if warmup else "",
                f", dropout {exact(self.dropout)}" if self.dropout else "",
            ]
        )


PAPERS_KIND = Kind(p_L=0.5)
"""Of the stochastic trainings in the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation (None for one value) of n values."""

    mean: float
    sd: float | None
    n: int


def spread(values: Iterable[float]) -> Spread:
    """Of at least one value."""
    found = list(values)
    return Spread(
        mean=statistics.fmean(found),
        sd=statistics.stdev(found) if len(found) > 1 else None,
        n=len(found),
    )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ by their seeds only: one training of a setting."""

    kind: Kind  # what tells it from the other arms of its setting
    runs: tuple[Run, ...]

    @property
    def p_L(self) -> float:
        """1 at constant depth."""
        return self.kind.p_L

    @property
    def dropout(self) -> float:
        """The probability that a value within a branch is dropped."""
        return self.kind.dropout

    @property
    def name(self) -> str:
        """For legends and rows."""
        return self.kind.name

    @property
    def repeats_a_seed(self) -> bool:
        """So that its spread is not over seeds alone."""
        return len({run.params["seed"] for run in self.runs}) < len(self.runs)

    def spread_of(self, value: Callable[[Run], float]) -> Spread:
        """Over the runs."""
        return spread(map(value, self.runs))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that share all that the comparison of constant depth with the others must share."""

    label: str  # unlike every other setting's
    constant: Arm | None  # with the least dropout of the setting, mostly none
    stochastic: tuple[Arm, ...]  # the most like the paper's first
    dropout: tuple[Arm, ...]  # constant depth with more dropout

    @property
    def compared(self) -> tuple[Arm, ...]:
        """What stands against constant depth."""
        return (*self.stochastic, *self.dropout)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Constant depth first."""
        return (*((self.constant,) if self.constant else ()), *self.compared)

    @property
    def runs(self) -> list[Run]:
        """Of all arms."""
        return [run for arm in self.arms for run in arm.runs]

    def get(self, key: str) -> Any:
        """A training parameter that all its runs share."""
        return flatten(self.runs[0].params)[key]

    @property
    def pictures(self) -> str:
        """The data set, or the one that its images are."""
        return self.runs[0].pictures

    @property
    def slug(self) -> str:
        """The label for a file's name."""
        return slug(self.label)


def key_of(run: Run, without: Iterable[str] = ()) -> Key:
    """Runs of one key belong to one setting. without: further parameters that may differ."""
    apart = _NOT_OF_THE_SETTING | set(without)
    params = flatten(run.params).items()
    shared = {(name, _hashable(value)) for name, value in params if name.split(".")[0] not in apart}
    return frozenset(shared | {("dataset_digest", run.dataset_digest)})


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def group(runs: Sequence[Run]) -> list[Setting]:
    """The settings, sorted by data and depth, each with a label of its own."""
    by_key: dict[Key, list[Run]] = {}
    for run in runs:
        by_key.setdefault(key_of(run), []).append(run)
    labels = labels_of(by_key)
    settings = [_setting(labels[key], found) for key, found in by_key.items()]
    return sorted(settings, key=lambda setting: (setting.pictures, setting.get("depth"), setting.label))


def _setting(label: str, runs: Iterable[Run]) -> Setting:
    by_kind: dict[Kind, list[Run]] = {}
    for run in runs:
        by_kind.setdefault(kind_of(run.params), []).append(run)
    arms = [Arm(kind=kind, runs=tuple(sorted(found, key=_by_seed))) for kind, found in by_kind.items()]
    least = min(arm.dropout for arm in arms)
    return Setting(
        label=label,
        constant=next((arm for arm in arms if arm.p_L == 1 and arm.dropout == least), None),
        stochastic=tuple(sorted((arm for arm in arms if arm.p_L != 1), key=_unlike_the_papers)),
        dropout=tuple(
            sorted((arm for arm in arms if arm.p_L == 1 and arm.dropout > least), key=lambda arm: arm.dropout)
        ),
    )


def kind_of(params: Mapping[str, Any]) -> Kind:
    """That of a run with these parameters, or of a table's row with these columns; one may be younger."""
    if params["p_L"] == 1:
        return Kind(p_L=1.0, rule="", draw="", dropout=params["dropout"])
    return Kind(**{key: params[key] for key in Kind._fields if key in params})


def _by_seed(run: Run) -> tuple[int, str]:
    return (run.params["seed"], run.run)


def _unlike_the_papers(arm: Arm) -> tuple[float, bool, bool, int, float, float]:
    kind, papers = arm.kind, PAPERS_KIND
    return (
        kind.dropout,
        kind.rule != papers.rule,
        kind.draw != papers.draw,
        kind.p_L_warmup_epochs,
        abs(kind.p_L - papers.p_L),
        kind.p_L,
    )


def departure(run: Run) -> str:
    """How a run differs from every training of the papers; "" if it is one of them."""
    if run.recipe is not None:
        return ""
    is_full = is_full_size(run.params, run.num_train, run.image_size)
    return _OTHER if is_full else _REDUCED


def size_mark(runs: Iterable[Run]) -> str:
    """What must stand beside results of runs that are of no recipe; "" where all are."""
    found = list(runs)
    reduced = [run for run in found if run.recipe is None]
    if not reduced:
        return ""
    narrow = {" ".join(map(str, run.params["widths"])) for run in reduced if is_narrow(run.params)}
    parts = [
        f"{_either(run.params['depth'] for run in reduced)} layers",
        *([f"widths {_either(narrow)}"] if narrow else []),
        _either(map(data_name, reduced)),
        f"{_either(run.num_train for run in reduced)} images{_pixels(reduced)}",
        f"{_either(run.params['epochs'] for run in reduced)} epochs",
    ]
    partly = "partly " if len(reduced) < len(found) else ""
    departures = set(map(departure, reduced))
    others = {key for run in reduced for key in other_settings(run.params, run.num_train, run.image_size)}
    unlike = f"; not the paper's {', '.join(sorted(others))}" if others else ""
    return f"{partly}{_REDUCED if _REDUCED in departures else _OTHER}: {', '.join(parts)}{unlike}"


def _pixels(runs: Iterable[Run]) -> str:
    sizes = {" x ".join(map(str, run.image_size)) for run in runs if run.image_size}
    return f" of {_either(sizes)} pixels" if sizes else ""


def _either(values: Iterable[Any]) -> str:
    """`20`, `20 and 56`, `20, 32 and 56`, `20 to 110`."""
    found = sorted(set(values))
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in found]
    if len(texts) > 3:
        return f"{texts[0]} to {texts[-1]}"
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))

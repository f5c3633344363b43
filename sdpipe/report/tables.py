"""The paper's tables 1 and 2, and degradation: measured, with n and spread, beside the paper's numbers."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sdpipe.recipes import PaperResult, load_recipes
from sdpipe.report.runs import Run
from sdpipe.report.settings import PAPERS_KIND, Arm, Setting, Spread, size_mark
from sdpipe.training.run_files import CONTINUED_ON

TableRow = dict[str, Any]

_ROUNDING = 1e-12  # of the mean of some fractions

# Where the paper reports nothing of a training itself: the recipe on the same data. True: with augmentation.
_CONTEXT = {
    ("cifar10", True): "cifar10",
    ("cifar10", False): "cifar10-plain-data",
    ("cifar100", True): "cifar100",
    ("cifar100", False): "cifar100-plain-data",
    ("svhn", False): "svhn",
}


def table1(settings: Iterable[Setting]) -> list[TableRow]:
    """Test errors as fractions: a row for each setting and training compared in it."""
    return [_row1(setting, arm) for setting, arm in _pairs(settings)]


def table2(settings: Iterable[Setting]) -> list[TableRow]:
    """Training times in seconds, and the share that is saved."""
    return [_row2(setting, arm) for setting, arm in _pairs(settings)]


def degradation_table(settings: Iterable[Setting]) -> list[TableRow]:
    """Nets with other skips, or none, at constant depth: a row for each setting."""
    return [_row_degradation(setting) for setting in settings if setting.constant]


def _pairs(settings: Iterable[Setting]) -> Iterable[tuple[Setting, Arm | None]]:
    for setting in settings:
        for arm in setting.compared or (None,):
            yield setting, arm


def _row1(setting: Setting, arm: Arm | None) -> TableRow:
    constant = setting.constant.spread_of(_test_error) if setting.constant else None
    compared = arm.spread_of(_test_error) if arm else None
    both: TableRow = {}
    if constant and compared and arm:
        both["difference"] = _difference(constant, compared)
        both["verdict"] = verdict(constant, compared, "stochastic" if arm.p_L < 1 else "dropout")
    recipe, result, context = _paper(setting, arm)
    paper = _known(
        paper_recipe=recipe,
        paper_context=context,
        paper_constant_error=result and result.constant_error,
        paper_constant_error_in_text=result and result.constant_error_in_text,
        paper_stochastic_error=result and result.stochastic_error,
    )
    return {
        **_head(setting, arm),
        **_columns("constant_error", constant),
        **_columns("compared_error", compared),
        **both,
        **paper,
        **_notes(setting, arm),
    }


def _row2(setting: Setting, arm: Arm | None) -> TableRow:
    constant = setting.constant.spread_of(_train_s) if setting.constant else None
    compared = arm.spread_of(_train_s) if arm else None
    both = {"saving": 1 - compared.mean / constant.mean} if constant and compared else {}
    recipe, result, context = _paper(setting, arm)
    timed = bool(result and result.constant_train_s)
    paper = _known(
        paper_recipe=recipe if timed else None,
        paper_context=context if timed else None,
        paper_constant_s=result and result.constant_train_s,
        paper_stochastic_s=result and result.stochastic_train_s,
    )
    runs = _runs(setting, arm)
    machines = sorted(set(map(_machine, runs)))
    is_mixed = len(machines) > 1 or any(CONTINUED_ON in machine for machine in machines)
    warning = {"warning": f"different {_differing(runs)}: the times do not compare"} if is_mixed else {}
    return {
        **_head(setting, arm),
        **_columns("constant_s", constant),
        **_columns("compared_s", compared),
        **both,
        **paper,
        "hardware": " | ".join(machines),
        **warning,
        **_notes(setting, arm),
    }


def _machine(run: Run) -> str:
    """What a training's time is of: hardware, precision and layout, and what else changes it alone."""
    options = (key for key in ("compile", "recompute") if run.params.get(key))
    return "; ".join([run.hardware, run.compute, *options])


def _differing(runs: Iterable[Run]) -> str:
    hardware = {run.hardware for run in runs}
    is_one = len(hardware) == 1 and CONTINUED_ON not in hardware.pop()
    return "precision or options of computing" if is_one else "hardware"


def _row_degradation(setting: Setting) -> TableRow:
    assert setting.constant
    measured: dict[str, Callable[[Run], float]] = {
        "last_train_loss": lambda run: run.history[-1]["train_loss"],
        "validation_error": lambda run: run.validation_error,
        "test_error": _test_error,
    }
    row: TableRow = {key: setting.get(key) for key in ("skip", "depth")}
    row = {"setting": setting.label, **row, "n": len(setting.constant.runs)}
    for name, value in measured.items():
        row |= _columns(name, setting.constant.spread_of(value))
    mark = size_mark(setting.constant.runs)
    return {**row, "full_size": not mark, "mark": mark}


def verdict(constant: Spread, compared: Spread, name: str) -> str:
    """What the two errors say, in a plain word. name: of what is compared with constant depth."""
    difference = _difference(constant, compared)
    if difference == 0:
        return "equal"
    word = f"{name} is {'worse' if difference > 0 else 'better'}"
    spreads = [found.sd for found in (constant, compared) if found.sd is not None]
    if len(spreads) < 2:
        return f"{word}; one run tells no spread"
    return f"{word}, by less than the spread" if abs(difference) < max(spreads) else word


def _difference(constant: Spread, compared: Spread) -> float:
    """Of the means; 0 where it is their rounding: one image of 50,000 in one of 100 runs is 2e-7."""
    difference = compared.mean - constant.mean
    return difference if abs(difference) > _ROUNDING else 0.0


def _head(setting: Setting, arm: Arm | None) -> TableRow:
    kind = arm.kind._asdict() if arm else {}
    return {
        "setting": setting.label,
        "dataset": setting.get("dataset"),
        "depth": setting.get("depth"),
        **kind,
        "n_constant": len(setting.constant.runs) if setting.constant else 0,
        "n_compared": len(arm.runs) if arm else 0,
    }


def _columns(name: str, found: Spread | None) -> TableRow:
    return _known(**{f"{name}_mean": found and found.mean, f"{name}_sd": found and found.sd})


def _known(**values: Any) -> TableRow:
    return {name: value for name, value in values.items() if value is not None}


def _notes(setting: Setting, arm: Arm | None) -> TableRow:
    runs = _runs(setting, arm)
    mark = size_mark(runs)
    arms = [found for found in (setting.constant, arm) if found]
    repeated = any(found.repeats_a_seed for found in arms)
    note = {"note": "a seed was run more than once"} if repeated else {}
    return {"full_size": not mark, "mark": mark, **note}


def _runs(setting: Setting, arm: Arm | None) -> list[Run]:
    return [run for found in (setting.constant, arm) if found for run in found.runs]


def _paper(setting: Setting, arm: Arm | None) -> tuple[str | None, PaperResult | None, str | None]:
    """A recipe, what the paper reports of it, and of what that is, where it is not of this very training."""
    recipes = {run.recipe for run in _runs(setting, arm)}
    own = load_recipes().get(recipes.pop() or "") if len(recipes) == 1 else None
    result = own.results.get(setting.get("epochs")) if own else None
    if own and result and (arm is None or arm.kind == PAPERS_KIND):
        return own.name, result, None
    known = own.name if own and result else _CONTEXT.get((setting.pictures, setting.runs[0].is_augmented))
    if known is None or setting.get("skip") == "plain":
        return None, None, None
    recipe = load_recipes()[known]
    depth = recipe.train["depth"]
    epochs = setting.get("epochs") if own and result else recipe.train["epochs"]
    context = [f"{depth} layers", f"{epochs} epochs", f"p_L {PAPERS_KIND.p_L:g}", *_not_of(arm)]
    return known, recipe.results[epochs], ", ".join(context)


def _not_of(arm: Arm | None) -> Iterator[str]:
    """What the training that the paper reports is beside its p_L, and this one is not."""
    if arm is None:
        return
    kind = arm.kind
    if kind.rule not in ("", PAPERS_KIND.rule):
        yield "linear decay"
    if kind.draw not in ("", PAPERS_KIND.draw):
        yield "drawn for each mini-batch"
    if kind.p_L_warmup_epochs:
        yield "no warm-up of p_L"
    if kind.dropout:
        yield "no dropout"


def _test_error(run: Run) -> float:
    return run.test_error


def _train_s(run: Run) -> float:
    return run.train_s

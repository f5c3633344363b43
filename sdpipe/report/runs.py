"""A finished run as the report sees it, and as a row of runs.csv."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from sdpipe.config import describe
from sdpipe.errors import DataError
from sdpipe.report.full_size import full_size_recipe
from sdpipe.training.config import TrainConfig

Numbers = dict[str, float]
"""A row of history.csv, timing.csv or ensemble.csv."""

NEEDED_PARAMS = (
    "dataset",
    "seed",
    "family",
    "depth",
    "skip",
    "p_L",
    "rule",
    "draw",
    "dropout",
    "epochs",
    "shift_px",
    "flip",
)


AUGMENTATION = ("shift_px", "flip", "crop", "colour_jitter", "lighting")
"""The keys of `train` that change images at random; older runs lack some."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the files of a run say. Errors are fractions, times seconds."""

    run: str  # its name, unlike every other of a report
    fingerprint: str
    dataset_digest: str
    pictures: str  # the data set, or the one whose classes and image size a folder of images has
    image_size: Sequence[int] | None  # height and width
    test_error: float  # at best_epoch
    validation_error: float  # the lowest
    best_epoch: float
    num_train: int
    num_validation: int
    expected_depth: float
    num_parameters: int
    train_s: float
    images_per_s: float
    hardware: str
    compute: str
    git_commit: str | None
    git_dirty: bool | None
    params: Mapping[str, Any]  # the run's section `train` of params.yaml
    history: Sequence[Numbers]  # history.csv and timing.csv; `epoch` may lie within an epoch
    ensemble: Sequence[Numbers]  # ensemble.csv; empty where there is none
    other_names: Sequence[str] = ()  # of the same training in further folders

    @cached_property
    def recipe(self) -> str | None:
        """The recipe whose size the run has, None for a reduced or another one."""
        return full_size_recipe(self.params, self.num_train, self.image_size)

    @property
    def is_augmented(self) -> bool:
        """Whether its images were changed at random."""
        return any(self.params.get(key) for key in AUGMENTATION)


_APART = ("run", "params", "history", "ensemble", "other_names")
_MAY_BE_UNKNOWN = ("image_size", "git_commit", "git_dirty")
_NUMBERS = frozenset(field.name for field in fields(Run) if field.type in (int, float))
FACTS = tuple(field.name for field in fields(Run) if field.name not in _APART)


def check_params(params: Mapping[str, Any], where: str) -> None:
    """Raise DataError unless the params hold what settings are made of."""
    if missing := [key for key in NEEDED_PARAMS if key not in params]:
        raise DataError(f"{where}: its params hold no {', '.join(missing)}; an older sdpipe trained it")


def check_numbers(values: Mapping[str, Any], where: str) -> None:
    """Raise DataError, naming the key, unless numbers are finite and not negative, and errors fractions."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            if name in _NUMBERS:
                raise DataError(f"{where}: {name}: expected a number, got {str(value)[:20]!r}")
            continue
        is_error, is_divisor = name.endswith("_error"), name in ("train_s", "members")
        if not 0 <= value <= (1 if is_error else sys.float_info.max) or (is_divisor and not value):
            expected = f"a number {'over' if is_divisor else 'from'} 0{' to 1' if is_error else ''}"
            raise DataError(f"{where}: {name}: expected {expected}, got {str(value)[:20]}")


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"warmup": {"epochs": 0}} as {"warmup.epochs": 0}."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `flatten` was given. Raises DataError if a key has a value and keys below it, too."""
    for key in flat:
        if below := [other for other in flat if other.startswith(f"{key}.")]:
            raise DataError(f"{where}: {key}: expected it or {below[0]}, found both")
    params: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        section = params
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return params


def to_row(run: Run) -> dict[str, Any]:
    """The run's row of runs.csv; unknown facts are left out."""
    facts = {name: getattr(run, name) for name in FACTS}
    known = {name: value for name, value in facts.items() if value is not None}
    recipe = {"recipe": run.recipe} if run.recipe else {}
    return {"run": run.run, **known, **recipe, "full_size": run.recipe is not None, **flatten(run.params)}


# Keys that came after the first reports, with the value that says what a training did before.
_AS_BEFORE: dict[str, Any] = {
    "p_L_warmup_epochs": 0,
    "validate_steps": 0,
    "plateau_epochs": 0,
    "normalisation": "pixel",
    "crop": None,
    "colour_jitter": 0.0,
    "lighting": 0.0,
    "recompute": False,
}

FIRST_COLUMNS = ("run", *FACTS, "recipe", "full_size")


def from_row(
    row: Mapping[str, Any], history: Sequence[Numbers], ensemble: Sequence[Numbers], path: Path
) -> Run:
    """The run of a row of runs.csv; whether it has full size is worked out anew.

    Raises DataError, naming `path` and the run, if something is missing.
    """
    where = f"{path}: {row.get('run', 'a row without a name')}"
    facts: dict[str, Any] = {name: row.get(name) for name in ("run", *FACTS)}
    facts["run"] = None if facts["run"] is None else str(facts["run"])  # a spreadsheet takes 7 for a number
    unknown = [name for name, value in facts.items() if value is None and name not in _MAY_BE_UNKNOWN]
    if unknown:
        raise DataError(f"{where}: {', '.join(unknown)} missing")
    check_numbers(facts, where)
    params = unflatten({key: value for key, value in row.items() if key not in FIRST_COLUMNS}, where)
    params = {**{key: value for key, value in _AS_BEFORE.items() if key not in params}, **params}
    check_params(params, where)
    return checked(Run(params=params, history=history, ensemble=ensemble, **facts), where)


def _checker(name: str, types: dict[str, Any]) -> type[BaseModel]:
    """A model of what tables hold, where 20.0 is a whole number, too; further keys are left alone."""
    return create_model(name, __config__=ConfigDict(extra="allow", allow_inf_nan=False), **types)


_Facts = _checker("Facts", {field.name: (field.type, ...) for field in fields(Run) if field.name in FACTS})
_known_params = {key: TrainConfig.model_fields[key] for key in NEEDED_PARAMS}
_param_types: dict[str, Any] = {key: (field.annotation, field) for key, field in _known_params.items()}
_Params = _checker("Params", _param_types | {"widths": (tuple[int, ...], ())})  # which older runs lack
_HISTORY = ("epoch", "learning_rate", "train_loss", "validation_error", "mean_abs_grad")


def checked(run: Run, where: str) -> Run:
    """The run, with its params as a training has them.

    Raises DataError if a fact or a param has another type or is no text that a file can hold, or if the
    history lacks a column or is another's.
    """
    try:
        _Facts.model_validate({name: getattr(run, name) for name in FACTS})
        params = _Params.model_validate(run.params).model_dump()
    except ValidationError as error:
        raise DataError(f"{where}: {describe(error)}") from error
    run = replace(run, params={key: params[key] for key in run.params})
    for key, value in flatten(run.params).items():
        if any(isinstance(each, Mapping) for each in (value, *(value if isinstance(value, list) else ()))):
            raise DataError(f"{where}: {key}: expected a number, a word or a list of them, got {value!r}")
    for key, value in to_row(run).items():
        try:
            json.dumps([key, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON's escapes can spell half a character
            raise DataError(f"{where}: {key}: expected text, got half a character in {value!r}") from error
    if not run.history or any(column not in row for row in run.history for column in _HISTORY):
        raise DataError(f"{where}: its history is empty or lacks one of {', '.join(_HISTORY)}")
    epochs = [row["epoch"] for row in run.history]
    if epochs != sorted(set(epochs)):
        raise DataError(
            f"{where}: its history: expected each epoch once and in order, got {str(epochs)[:60]}"
        )
    if (run.best_epoch, run.validation_error) not in {
        (row["epoch"], row["validation_error"]) for row in run.history
    }:
        raise DataError(
            f"{where}: its history has no epoch {run.best_epoch:g} with the validation error "
            f"{run.validation_error:g}, which was kept"
        )
    return run


def unique(runs: Iterable[Run]) -> list[Run]:
    """One run for each fingerprint, the first with an ensemble if there is one, sorted by name.

    Runs of one name are told apart by their fingerprints.
    """
    by_fingerprint: dict[str, Run] = {}
    names_of: dict[str, set[str]] = {}
    for run in runs:
        kept = by_fingerprint.setdefault(run.fingerprint, run)
        if run.ensemble and not kept.ensemble:
            by_fingerprint[run.fingerprint] = run
        names_of.setdefault(run.fingerprint, set()).add(run.run.removesuffix(_suffix(run)))
    kept_runs = sorted(by_fingerprint.values(), key=lambda run: (run.run, run.fingerprint))
    count = Counter(run.run for run in kept_runs)
    return [
        replace(
            run,
            run=run.run if count[run.run] == 1 else run.run + _suffix(run),
            other_names=sorted(names_of[run.fingerprint] - {run.run.removesuffix(_suffix(run))}),
        )
        for run in kept_runs
    ]


def _suffix(run: Run) -> str:
    """What stands behind its name where another training has the same one."""
    return f"~{run.fingerprint[:8]}"


def repetitions(runs: Iterable[Run]) -> list[str]:
    """A line for each further name that a training has: its run is not counted again."""
    return [f"{name}: the same training as {run.run}" for run in runs for name in run.other_names]

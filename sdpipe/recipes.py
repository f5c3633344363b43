"""Which trainings have the paper's size, and what the paper reports of them (Huang et al. 2016)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """The paper's numbers of one recipe. Errors are fractions, times seconds."""

    constant_error: float
    stochastic_error: float
    constant_train_s: float | None
    stochastic_train_s: float | None


def _hours(hours: int, minutes: int) -> float:
    return 3600.0 * hours + 60.0 * minutes


def _result(constant: float, stochastic: float, times: tuple[float, float] | None = None) -> PaperResult:
    return PaperResult(
        constant_error=constant,
        stochastic_error=stochastic,
        constant_train_s=times[0] if times else None,
        stochastic_train_s=times[1] if times else None,
    )


# Tables 1 and 2, and section 4 for ImageNet after 120 epochs.
_PAPER = {
    "cifar10": _result(0.0641, 0.0525, (_hours(20, 42), _hours(15, 7))),
    "cifar100": _result(0.2722, 0.2498, (_hours(20, 51), _hours(15, 20))),
    "cifar10-plain-data": _result(0.1363, 0.1166),
    "cifar100-plain-data": _result(0.4474, 0.378),
    "svhn": _result(0.0180, 0.0175, (_hours(33, 43), _hours(25, 33))),
    "cifar10-1202": _result(0.0667, 0.0491),
    "imagenet": _result(0.2178, 0.2198),
}
_SIZES = {  # recipe -> data set, depth, epochs, largest shift in pixels
    "cifar10": ("cifar10", 110, 500, 4),
    "cifar100": ("cifar100", 110, 500, 4),
    "cifar10-plain-data": ("cifar10", 110, 500, 0),
    "cifar100-plain-data": ("cifar100", 110, 500, 0),
    "svhn": ("svhn", 152, 50, 0),
    "cifar10-1202": ("cifar10", 1202, 300, 4),
}


def full_size_recipe(train_params: Mapping[str, Any]) -> str | None:
    """The recipe whose size a run has; None for every other run.

    train_params: the run's section of params.yaml.
    """
    size = tuple(train_params.get(key) for key in ("dataset", "depth", "epochs", "shift_px"))
    if train_params.get("skip") == "plain":
        return None
    return next((recipe for recipe, full in _SIZES.items() if full == size), None)


def paper_result(recipe: str) -> PaperResult | None:
    """What the paper reports of a recipe; None where it reports no pair of numbers."""
    return _PAPER.get(recipe)

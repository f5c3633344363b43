"""Whether a run is one of the papers' trainings, and if not, how it differs."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from sdpipe.recipes import NOT_OF_THE_RECIPE, load_recipes

Params = Mapping[str, Any]
"""A run's section `train` of params.yaml, with its overrides."""


class _Training(NamedTuple):
    """One of the papers'."""

    recipe: str
    num_train: int
    image_px: int
    train: dict[str, Any]  # the section of params.yaml


def full_size_recipe(params: Params, num_train: int, image_size: Sequence[int] | None) -> str | None:
    """The recipe of full size that a run is of, whatever its seed and p_L; None for every other run.

    num_train, image_size: how many images it was trained on, and their height and width; None if unknown.
    """
    wanted = _of_the_recipe(params)
    size = (num_train, list(image_size or ()))
    same = (each for each in _trainings() if (each.num_train, [each.image_px] * 2) == size)
    return next((each.recipe for each in same if _of_the_recipe(each.train) == wanted), None)


def is_full_size(params: Params, num_train: int, image_size: Sequence[int] | None) -> bool:
    """Whether a run has images, pixels, depth, widths and epochs of a paper's training, or more of them."""
    return next(_as_small(params, num_train, image_size), None) is not None


def other_settings(params: Params, num_train: int, image_size: Sequence[int] | None) -> list[str]:
    """The keys in which a run of full size differs from the most similar of the papers' trainings."""
    own = _of_the_recipe(params)
    differing = [
        [key for key, value in _of_the_recipe(each.train).items() if key in own and own[key] != value]
        for each in _as_small(params, num_train, image_size)
    ]
    return min(differing, key=len, default=[])


def is_narrow(params: Params) -> bool:
    """Whether a run has fewer channels than the papers' networks of its family."""
    usual = load_recipes()["imagenet" if params["family"] == "imagenet" else "cifar10"]
    return not _is_as_wide(params, usual.train)


def _as_small(params: Params, num_train: int, image_size: Sequence[int] | None) -> Iterator[_Training]:
    """The papers' trainings that a run is as large as, on the same data where they have some on it.

    It is so in depth with the same number of layers, or with more than the deepest of as many epochs: between
    two depths of the papers it is not.
    """
    family = [each for each in _trainings() if each.train["family"] == params["family"]]
    same_data = [each for each in family if each.train["dataset"] == params["dataset"]]
    compared = same_data or family
    for each in compared:
        epochs, depth = each.train["epochs"], each.train["depth"]
        deepest = max(other.train["depth"] for other in compared if other.train["epochs"] == epochs)
        is_as_large = (
            each.num_train <= num_train
            and each.image_px <= min(image_size or [0])
            and (params["depth"] == depth or params["depth"] > deepest)
            and epochs <= params["epochs"]
            and _is_as_wide(params, each.train)
        )
        if is_as_large:
            yield each


def _is_as_wide(params: Params, train: Params) -> bool:
    """A run that does not say has the papers' widths, as all had."""
    widths = params.get("widths", train["widths"])
    return all(own >= theirs for own, theirs in zip(widths, train["widths"], strict=False))


def _trainings() -> Iterator[_Training]:
    for recipe in load_recipes().values():
        if recipe.num_train and recipe.image_px:
            longer = ({**recipe.train, "epochs": epochs} for epochs in recipe.results)
            for train, run in product((recipe.train, *longer), recipe.runs.values()):
                yield _Training(recipe.name, recipe.num_train, recipe.image_px, {**train, **run})


def _of_the_recipe(train: Params) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple | list) else value
        for key, value in train.items()
        if key not in NOT_OF_THE_RECIPE
    }

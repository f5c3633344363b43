"""Whether a run is one of the papers' trainings, and if not, how it differs."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from sdpipe.recipes import NOT_OF_THE_RECIPE, load_recipes

Params = Mapping[str, Any]
"""A run's section `train` of params.yaml, with its overrides."""


def full_size_recipe(params: Params, num_train: int, image_size: Sequence[int] | None) -> str | None:
    """The recipe of full size that a run is of, whatever its seed and p_L; None for every other run.

    num_train, image_size: how many images it was trained on, and their height and width; None if unknown.
    """
    wanted = _of_the_recipe(params)
    trainings = _trainings_on(num_train, image_size)
    return next((name for name, train in trainings if _of_the_recipe(train) == wanted), None)


def is_full_size(params: Params, num_train: int, image_size: Sequence[int] | None) -> bool:
    """Whether a run has the images, depth and widths of a paper's training, or more, and as many epochs."""
    return any(_is_as_large(params, train) for _, train in _trainings_on(num_train, image_size))


def other_settings(params: Params, num_train: int, image_size: Sequence[int] | None) -> list[str]:
    """The keys in which a run of full size differs from the most similar of the papers' trainings."""
    own = _of_the_recipe(params)
    differing = [
        [key for key in theirs if key in own and own[key] != theirs[key]]
        for _, train in _trainings_on(num_train, image_size)
        if _is_as_large(params, train) and (theirs := _of_the_recipe(train))
    ]
    return min(differing, key=len, default=[])


def is_narrow(params: Params) -> bool:
    """Whether a run has fewer channels than the papers' networks of its family."""
    usual = load_recipes()["imagenet" if params["family"] == "imagenet" else "cifar10"]
    return not _is_as_wide(params, usual.train)


def _is_as_large(params: Params, train: Params) -> bool:
    return (
        train["depth"] == params["depth"]
        and train["epochs"] <= params["epochs"]
        and _is_as_wide(params, train)
    )


def _is_as_wide(params: Params, train: Params) -> bool:
    """A run that does not say has the papers' widths, as all had."""
    widths = params.get("widths", train["widths"])
    return all(own >= theirs for own, theirs in zip(widths, train["widths"], strict=False))


def _trainings_on(num_train: int, image_size: Sequence[int] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The papers' trainings on so many images of this size: name of the recipe, section `train`."""
    for recipe in load_recipes().values():
        if (recipe.num_train, [recipe.image_px] * 2) == (num_train, list(image_size or ())):
            longer = ({**recipe.train, "epochs": epochs} for epochs in recipe.results)
            for train, run in product((recipe.train, *longer), recipe.runs.values()):
                yield recipe.name, {**train, **run}


def _of_the_recipe(train: Params) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple | list) else value
        for key, value in train.items()
        if key not in NOT_OF_THE_RECIPE
    }

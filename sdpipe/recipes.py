"""The recipes: what of params.yaml makes each training of the papers, and what the papers report of it.

recipes.yaml beside this file holds them. A recipe gives the sections `train` and `runs`, the gate of `deploy`
and, for ImageNet, the size of the images; all else in params.yaml, such as where data come from, stays as the
user has it.
"""

import difflib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from sdpipe.config import load_yaml
from sdpipe.errors import ConfigError
from sdpipe.files import replacing
from sdpipe.params import check_params

SMALL = "-small"
BACKUP = "params.yaml.bak"
# How a training is computed is the user's: a recipe does not write over it.
_USERS = {"device", "precision", "compile", "recompute"}
# What is compared within a recipe: not which recipe, either.
NOT_OF_THE_RECIPE = _USERS | {"seed", "p_L", "rule", "draw", "p_L_warmup_epochs"}
_WORDS = {"linear_decay": "linear", "A": "residual"}  # in the names of runs
_LEAST_PLAIN = 0.01  # smaller numbers are written with an exponent
_HEAD = re.compile(r"(?:[ \t]*(?:#.*)?\n)*---[ \t]*\n")  # comments above a document's start


@dataclass(frozen=True, kw_only=True)
class PaperResult:
    """The paper's numbers of one recipe. Errors are fractions, times seconds."""

    constant_error: float
    constant_error_in_text: float | None  # where the text has another than table 1
    stochastic_error: float
    constant_train_s: float | None
    stochastic_train_s: float | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to fill params.yaml. train: every key of that section; runs: name -> what differs.

    fetch: data set -> keys of its section that are the paper's.
    num_train, image_px: training images and their side in the papers; None for a recipe of ours.
    results: what the paper reports after so many epochs; more than those of `train` where it went on.
    """

    name: str
    title: str
    train: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    fetch: dict[str, dict[str, Any]]
    max_test_error: float
    num_train: int | None
    image_px: int | None
    results: dict[int, PaperResult]


@cache
def load_recipes() -> dict[str, Recipe]:
    """All recipes by name, each small twin behind its full one."""
    raw = YAML(typ="safe").load((Path(__file__).parent / "recipes.yaml").read_text())
    return {recipe.name: recipe for name, values in raw.items() for recipe in _twins(name, values)}


def _twins(name: str, values: Mapping[str, Any]) -> Iterator[Recipe]:
    train, small = values["train"], values.get("small")
    yield Recipe(
        name=name,
        title=values["title"],
        train=train,
        runs=_runs(values),
        fetch=values.get("fetch", {}),
        max_test_error=values["max_test_error"],
        num_train=values["images"]["train"] if "images" in values else None,
        image_px=values["images"]["px"] if "images" in values else None,
        results=_results(train["epochs"], values),
    )
    if small is not None:
        yield Recipe(
            name=name + SMALL,
            title=f"the path of {name} on the embedded digits, in minutes; ours",
            train={**train, **small["train"]},
            runs=_runs({**values, **small}),
            fetch={},
            max_test_error=small["max_test_error"],
            num_train=None,
            image_px=None,
            results={},
        )


def _results(epochs: int, values: Mapping[str, Any]) -> dict[int, PaperResult]:
    found = {epochs: values["paper"]} if "paper" in values else {}
    if "longer" in values:
        found[values["longer"]["epochs"]] = values["longer"]["paper"]
    return {after: _paper(numbers) for after, numbers in found.items()}


def _paper(values: Mapping[str, Any]) -> PaperResult:
    def seconds(key: str) -> float | None:
        if key not in values:
            return None
        hours, minutes = values[key].split(":")
        return 3600.0 * int(hours) + 60.0 * int(minutes)

    return PaperResult(
        constant_error=values["constant"],
        constant_error_in_text=values.get("constant_in_text"),
        stochastic_error=values["stochastic"],
        constant_train_s=seconds("constant_time"),
        stochastic_train_s=seconds("stochastic_time"),
    )


def _runs(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if "grid" not in values:
        return dict(values["runs"])
    grid = values["grid"]
    combinations = [dict(zip(grid, combination, strict=True)) for combination in product(*grid.values())]
    first_rule = grid.get("rule", [None])[0]
    # At constant depth both rules are one and the same training.
    chosen = [run for run in combinations if run.get("p_L") != 1 or run.get("rule", first_rule) == first_rule]
    runs = {"-".join(_word(key, value) for key, value in run.items()): run for run in chosen}
    assert len(runs) == len(chosen), f"two runs of one name: {', '.join(runs)}"
    return runs


def _word(key: str, value: Any) -> str:
    """In the letters that a run's name may have."""
    if key == "p_L":
        word = f"p{100 * value:.6g}"
    else:
        word = f"d{value}" if key == "depth" else _WORDS.get(value, str(value))
    return word.replace(".", "_")


def with_seeds(runs: Mapping[str, dict[str, Any]], num_seeds: int) -> dict[str, dict[str, Any]]:
    """Each run with the seeds 0..num_seeds - 1; one seed: the runs as they are."""
    if num_seeds == 1:
        return dict(runs)
    return {
        f"{name}-s{seed}": {**overrides, "seed": seed}
        for seed in range(num_seeds)
        for name, overrides in runs.items()
    }


def find_recipe(name: str) -> Recipe:
    """Raises ConfigError naming the recipes whose names are close."""
    recipes = load_recipes()
    if name not in recipes:
        close = " or ".join(difflib.get_close_matches(name, recipes))
        hint = f"did you mean {close}? " if close else ""
        raise ConfigError(f"{name}: no such recipe; {hint}`sdpipe recipe list` shows all")
    return recipes[name]


def apply_recipe(name: str, params: Path, num_seeds: int = 1) -> str:
    """The text of a params.yaml that has this recipe in place of its `train`, `runs` and `deploy`.

    Comments and the other sections stay, and in `train` what says how it is computed, such as device. Each
    list comes on one line; DVC gives every item a line when it writes the file.
    Raises ConfigError if there is no such recipe, or `params` cannot be read, lacks a section, or is wrong in
    another one.
    """
    recipe = find_recipe(name)
    yaml = _round_trip()
    try:
        load_yaml(YAML(typ="safe"), params)  # as the stages will read it, which is stricter
        values = load_yaml(yaml, params)
    except OSError as error:
        raise ConfigError(f"{params}: {error.strerror}; recipes are written into a project's") from error
    for section in ("fetch", "train", "deploy"):
        if not isinstance(values, dict) or not isinstance(values.get(section), dict):
            raise ConfigError(f"{params}: expected a mapping with the section {section}")
    runs = with_seeds(recipe.runs, num_seeds)
    for key in set(values["train"]) - set(recipe.train) - NOT_OF_THE_RECIPE:
        del values["train"][key]  # of another version; the rest is checked below
    for key, value in recipe.train.items():
        if not _stands(values["train"], key, value) and not (key in _USERS and key in values["train"]):
            values["train"][key] = _flow(yaml, value)
            _align_comment(values["train"], key)
    if not _stands(values, "runs", runs):
        values["runs"] = yaml.map(**{run: _flow(yaml, overrides) for run, overrides in runs.items()})
    for dataset, wanted in recipe.fetch.items():
        section = values["fetch"].get(dataset)
        if isinstance(section, dict):  # else the check below says what is wrong with it
            section.update({key: value for key, value in wanted.items() if not _stands(section, key, value)})
    values["deploy"].update(run=next(iter(runs)), max_test_error=recipe.max_test_error)
    _put_lists_on_one_line(yaml, values)
    dumped = io.StringIO()
    yaml.dump(values, dumped)
    head = _HEAD.match(params.read_text())  # which the library drops
    text = (head.group() if head else "") + dumped.getvalue()
    check_params(YAML(typ="safe").load(text))
    return text


def use_recipe(name: str, params: Path, num_seeds: int = 1) -> Path | None:
    """Write the recipe into `params`, or the file that this is a link to, whole or not at all.

    Returns where the params.yaml before stands now; None if nothing had to be changed.
    """
    text = apply_recipe(name, params, num_seeds)
    before = params.read_bytes()
    after = (text.replace("\n", "\r\n") if b"\r\n" in before else text).encode()
    if after == before:
        return None
    if not os.access(params, os.W_OK):
        raise ConfigError(f"{params}: is write-protected, and stays as it is")
    backup = _backup(params, before)
    for path, content in ((backup, before), (params.resolve(), after)):
        with replacing(path) as beside:
            beside.write_bytes(content)
            shutil.copymode(params, beside)  # it may be private
    return backup


def _backup(params: Path, content: bytes) -> Path:
    """The first of params.yaml.bak, params.yaml.bak2, ... that is free or holds this content."""
    names = (params.with_name(f"{BACKUP}{number if number > 1 else ''}") for number in count(1))
    return next(path for path in names if not path.exists() or path.read_bytes() == content)


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    yaml.representer.add_representer(float, _represent_float)
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _represent_float(representer: Any, value: float) -> Any:
    """As params.yaml has them: 0.02, but 2.0e-3."""
    text = repr(value)
    if 0 < value < _LEAST_PLAIN:
        digits, _, exponent = f"{Decimal(text):e}".partition("e")
        text = f"{digits if '.' in digits else f'{digits}.0'}e{exponent}"
    return representer.represent_scalar("tag:yaml.org,2002:float", text)


def _align_comment(section: Any, key: str) -> None:
    """Put the comment behind a key below most others, from where a longer value had pushed it."""
    comments = {name: tokens[2] for name, tokens in section.ca.items.items() if tokens[2] is not None}
    if key in comments:
        ((column, _),) = Counter(comment.column for comment in comments.values()).most_common(1)
        comments[key].column = column


def _put_lists_on_one_line(yaml: YAML, section: Any) -> None:
    """Here and in the sections below, where no comment stands between the items."""
    for key, value in section.items():
        if isinstance(value, CommentedMap):
            _put_lists_on_one_line(yaml, value)
        elif isinstance(value, CommentedSeq) and not any(map(any, value.ca.items.values())):
            section[key] = _flow(yaml, list(value))
        # The library has [] here where a list stood in lines, and does not end the line of what replaced it.
        if (comments := section.ca.items.get(key)) and comments[3:] == [[]]:
            comments[3] = None


def _stands(section: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether it is there as it shall be, not only equal: to the stages 110.0 is not 110, and true not 1."""
    try:
        return key in section and json.dumps(section[key], sort_keys=True) == json.dumps(
            value, sort_keys=True
        )
    except TypeError:  # keys or values that are no recipe's
        return False


def _flow(yaml: YAML, value: Any) -> Any:
    """Lists and mappings on one line, as params.yaml has them."""
    if isinstance(value, dict):
        made = yaml.map(**value)
    elif isinstance(value, list):
        made = yaml.seq(value)
    else:
        return value
    made.fa.set_flow_style()
    return made

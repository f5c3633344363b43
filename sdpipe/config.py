"""How a section of params.yaml becomes a frozen, typed object. The sections stand beside their users.

params.yaml is the one home of every number, so sections hold no defaults. It is read with ruamel.yaml, as
DVC reads it: `1e-4` is a number and `yes` a string, in both or in neither.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sdpipe.errors import ConfigError

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what scikit-learn takes, too
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A frozen section: unknown, missing, mistyped and out-of-range keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


# ruamel.yaml does not put into words what its parts stumble over: month 13, `!!bool x`, a thousand brackets.
_NOT_YAML = (YAMLError, ValueError, LookupError, AttributeError, RecursionError)


def load_yaml(yaml: YAML, path: Path) -> Any:
    """What a file holds. Raises ConfigError if it is not YAML, and OSError."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"))  # also as editors on Windows write it
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from error


def read_params(path: Path) -> dict[str, Any]:
    """Read a params.yaml.

    Raises ConfigError if the file is missing, is not YAML, or is not a mapping.
    """
    try:
        params = load_yaml(YAML(typ="safe"), path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not isinstance(params, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(params).__name__}")
    return params


def get_value(params: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key such as `fetch.digits`; ConfigError names the key that is missing."""
    value: Any = params
    for depth, part in enumerate(key.split("."), start=1):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"params.yaml: {'.'.join(key.split('.')[:depth])}: missing")
        value = value[part]
    return value


def parse_section(
    section: type[AnySection], values: Any, key: str, overrides: Mapping[str, str] | None = None
) -> AnySection:
    """Check `values` against a section class.

    key: where the section stands in params.yaml, for messages.
    overrides: for fields that came from elsewhere, the key of that place.
    Raises ConfigError with one clause for each fault: key, expectation, value found.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"params.yaml: {describe(error, key, overrides)}") from error


def describe(error: ValidationError, key: str = "", overrides: Mapping[str, str] | None = None) -> str:
    """A clause for each fault: key, expectation, value found. See `parse_section`."""
    faults = error.errors()
    said = [fault for fault in faults if not _follows(fault, faults)]
    return "; ".join(_describe(fault, key, overrides or {}) for fault in said)


def _follows(fault: Any, faults: Sequence[Any]) -> bool:
    """Whether a list is called too short only because an item of it is wrong, which is said already."""
    where = fault["loc"]
    return fault["type"] == "too_short" and any(
        other["loc"][: len(where)] == where and other is not fault for other in faults
    )


_MOST_SHOWN = 200  # characters of a wrong value

# pydantic names the members of a union in a fault's path.
_UNION_TAG = re.compile(r"\[key\]|constrained-|dict\[")


def _describe(fault: Any, key: str, overrides: Mapping[str, str]) -> str:
    where = [str(part) for part in fault["loc"] if not _UNION_TAG.match(str(part))]
    base = overrides.get(where[0], key) if where else key
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "too_short":
        message = f"expected at least {fault['ctx']['min_length']} of them"
    expectation = message.replace("Input should be", "expected", 1).replace(
        "Extra inputs are not", "key not", 1
    )
    says_it = fault["type"] in ("missing", "extra_forbidden", "value_error")
    text = "" if says_it else f", got {fault['input']!r}"
    found = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return f"{'.'.join([base, *where]).strip('.')}: {expectation}{found}"

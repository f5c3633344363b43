"""What model.onnx says of itself: the keys of its metadata, written by export, read by predict."""

import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any, get_args, get_origin

from sdpipe.errors import ModelError

SCHEMA_VERSION = 3
"""Raised when a reader of the old form would misread the new one."""

PREFIX = "sdpipe."

MAX_SIDE = 1024
"""Pixels. Larger inputs are refused: a batch of them would fill the memory."""

_MAX_NUMBER = 2**53


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The description of a deployed network. Each field is one metadata entry, `sdpipe.<field>`, as JSON."""

    schema_version: int
    variant: str  # fp32, int8, fp16, ensemble, or a pruned one such as keep-17
    class_names: list[str]
    image_size: list[int]  # height, width in pixels
    channels: int  # 1 grey, 3 RGB
    resize: str  # how a picture of another size is brought to image_size
    crop: str
    crop_fraction: float  # side of the box that is cut out, over that of the largest one that fits
    data_set: str
    data_digest: str
    depth: int
    rule: str
    p_L: float
    survival_probs: list[float]  # p_1..p_L of the training
    scales: list[
        float
    ]  # s_1..s_L, folded into the weights: p_l, or what pruning chose; 0: the block is removed
    temperature: float  # that the logits are divided by for the probabilities
    best_epoch: float  # whole, unless it was validated within epochs
    fingerprint: str
    sdpipe_version: str

    def to_properties(self) -> dict[str, str]:
        """Metadata entries, text to text."""
        return {PREFIX + name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], name: str) -> "Metadata":
        """Read the entries back; ModelError names `name` if they are foreign or of another schema."""
        if PREFIX + "schema_version" not in properties:
            raise ModelError(f"{name}: an ONNX file, but not one that sdpipe exported")
        values: dict[str, Any] = {}
        for entry in ("schema_version", *(column.name for column in fields(cls))):
            try:
                values[entry] = json.loads(properties[PREFIX + entry])
            except (KeyError, ValueError, RecursionError) as error:
                raise ModelError(
                    f"{name}: its metadata entry {PREFIX}{entry} is missing or damaged"
                ) from error
            if entry == "schema_version" and values[entry] != SCHEMA_VERSION:
                raise ModelError(
                    f"{name}: schema {_short(values[entry])}, this sdpipe reads schema {SCHEMA_VERSION}; "
                    "export it again or install the sdpipe that made it"
                )
        for column in fields(cls):
            if not _is(values[column.name], column.type):
                raise ModelError(
                    f"{name}: its metadata entry {PREFIX}{column.name} is {_short(values[column.name])}, "
                    f"expected {_expected(column)}"
                )
        metadata = cls(**values)
        for entry, holds, expected in metadata._ranges():
            if not holds:
                found = _short(values[entry])
                raise ModelError(
                    f"{name}: its metadata entry {PREFIX}{entry} is {found}, expected {expected}"
                )
        return metadata

    def _ranges(self) -> list[tuple[str, bool, str]]:
        """What prediction relies on: entry, whether it holds, what was expected."""
        size, names, num_blocks = self.image_size, self.class_names, len(self.survival_probs)
        return [
            ("class_names", bool(names) and len({*names}) == len(names), "at least one name, each once"),
            (
                "image_size",
                len(size) == 2 and all(0 < side <= MAX_SIDE for side in size),
                f"a height and a width of 1 to {MAX_SIDE}",
            ),
            ("channels", self.channels in (1, 3), "1 or 3"),
            (
                "survival_probs",
                # Besides the stem and the head a block has two or three layers.
                num_blocks > 0
                and self.depth - 2 in (2 * num_blocks, 3 * num_blocks)
                and all(0 < prob <= 1 for prob in self.survival_probs),
                f"probabilities over 0, one for each block of {self.depth} layers",
            ),
            (
                "scales",
                len(self.scales) == num_blocks and all(scale >= 0 for scale in self.scales),
                f"{num_blocks} numbers, none below 0",
            ),
            ("temperature", self.temperature > 0, "more than 0"),
            ("crop_fraction", 0 < self.crop_fraction <= 1, "more than 0, at most 1"),
        ]


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(item, *get_args(kind)) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is str:
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    # JSON's numbers have no end, and Python's json also reads NaN and Infinity.
    return isinstance(value, int | float if kind is float else kind) and abs(value) < _MAX_NUMBER


def _expected(column: Field[Any]) -> str:
    name = column.type.__name__ if isinstance(column.type, type) else str(column.type)
    return name + (", of whole characters" if "str" in name else ", finite and under 2^53")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."

"""What model.onnx says of itself: the keys of its metadata, written by export, read by predict."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sdpipe.errors import ModelError

SCHEMA_VERSION = 3
"""Raised when a reader of the old form would misread the new one."""

PREFIX = "sdpipe."


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
            except (KeyError, ValueError) as error:
                raise ModelError(
                    f"{name}: its metadata entry {PREFIX}{entry} is missing or damaged"
                ) from error
            if entry == "schema_version" and values[entry] != SCHEMA_VERSION:
                raise ModelError(
                    f"{name}: schema {values[entry]}, this sdpipe reads schema {SCHEMA_VERSION}; "
                    "export it again or install the sdpipe that made it"
                )
        metadata = cls(**values)
        names, size = metadata.class_names, metadata.image_size
        if not (_is_list_of(names, str) and names and _is_list_of(size, int) and len(size) == 2):
            raise ModelError(f"{name}: its metadata hold no class names or no image size")
        if not _is_list_of(metadata.survival_probs, float):
            raise ModelError(f"{name}: its metadata hold no survival probabilities")
        return metadata


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)

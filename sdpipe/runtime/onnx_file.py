"""What is in an ONNX file, read without onnx and before onnxruntime sees it.

Only what sdpipe exports is let through: no data outside the file, no subgraphs, no functions, and the
operators below; shapes.py judges what these make. Numbers of fields:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; encoding:
https://protobuf.dev/programming-guides/encoding
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdpipe.errors import ModelError

MAX_BYTES = 2**31 - 1
"""Protobuf's own limit; larger files are refused before they are read."""

OPERATORS = frozenset(
    {
        # model.onnx: normalisation, the test network, the head
        "Transpose", "Cast", "Sub", "Div", "Conv", "Relu", "Add", "AveragePool", "MaxPool", "Pad",
        "ReduceMean", "Gemm", "Softmax",
        # model.int8.onnx
        "QuantizeLinear", "DequantizeLinear",
        # ensemble.onnx: block switches as an input
        "Mul", "Split",
    }
)  # fmt: skip
"""Of ONNX's own domain. None runs a subgraph, reads a file or draws at random."""

MAX_USES = 8192
"""Of one operator; onnxruntime opens a file in time that grows with the square of it. The int8 file of 1202
layers with learned skips has 6,000 of the commonest."""

_MAX_FIELDS = 1_000_000  # a 1202-layer file has 60,000; each costs a microsecond
_MAX_INTEGERS = 64  # in a list, or its bytes; a shape or an attribute has up to four
_OWN_DOMAINS = frozenset({"", "ai.onnx"})
_VARINT, _LENGTH = 0, 2  # wire types

Field = tuple[int, int, int, memoryview]
"""Number, wire type, value if it is a varint, bytes if it has a length."""

Attribute = int | list[int] | str | None
"""None: a float, which is not read."""


class Node(NamedTuple):
    """One use of an operator, with the names of the values that it takes and makes."""

    operator: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Attribute]


class Tensor(NamedTuple):
    """One that stands in the file, such as weights."""

    shape: tuple[int, ...]
    raw: memoryview  # its numbers as bytes, or nothing where the file has them in another form


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """The parts of a file that say what onnxruntime would do with it."""

    properties: dict[str, str]  # the metadata entries
    nodes: list[Node]  # in the file's order
    tensors: dict[str, Tensor]  # by name
    foreign: tuple[str, ...]  # what no file of ours holds, each once

    @property
    def operators(self) -> dict[str, int]:
        """How often each stands in the file, by name."""
        return dict(sorted(Counter(node.operator for node in self.nodes).items()))


def read_model_file(path: Path) -> bytes:
    """The bytes of a model file, which is read once: what was checked is what runs.

    Raises ModelError if it is missing, no regular file, larger than protobuf allows or cannot be read.
    """
    if not path.is_file():
        found = "is not a file" if path.exists() else "no such model file"
        raise ModelError(f"{path}: {found}; `make repro` makes models/model.onnx")
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                raise ModelError(f"{path}: {size:,} bytes, an ONNX file has at most {MAX_BYTES:,}")
            if not size:
                raise ModelError(f"{path}: the file is empty")
            return stream.read(size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def parse(raw: bytes, name: str) -> OnnxFile:
    """Read a file's structure. Raises ModelError naming `name` if it is damaged."""
    reader = _Reader()
    try:
        reader.model(memoryview(raw))
    except (IndexError, ValueError) as error:
        raise ModelError(f"{name}: damaged, or no ONNX file: {error}") from error
    return OnnxFile(
        properties=reader.properties,
        nodes=reader.nodes,
        tensors=reader.tensors,
        foreign=tuple(dict.fromkeys(reader.foreign)),
    )


class _Reader:
    """Walks through every occurrence of every field: a later one may overrule or join an earlier one."""

    def __init__(self) -> None:
        self.properties: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.foreign: list[str] = []
        self.num_fields = 0

    def model(self, message: memoryview) -> None:
        for number, wire_type, _, content in self._fields(message):
            if number == 7:
                self._graph(_message(wire_type, content))
            elif number == 14:
                self._property(_message(wire_type, content))
            elif number == 20:
                self.foreign.append("training information")
            elif number == 25:
                self.foreign.append("functions")
            elif number not in (1, 2, 3, 4, 5, 6, 8):
                self.foreign.append(f"field {number} of a model")

    def _property(self, message: memoryview) -> None:
        entry = {1: "", 2: ""}
        for number, wire_type, _, content in self._fields(message):
            if number not in entry:
                raise ValueError(f"field {number} of a metadata entry")
            entry[number] = _text(wire_type, content)
        self.properties[entry[1]] = entry[2]

    def _graph(self, message: memoryview) -> None:
        for number, wire_type, _, content in self._fields(message):
            if number == 1:
                self._node(_message(wire_type, content))
            elif number == 5:
                name, tensor = self._tensor(_message(wire_type, content))
                if name in self.tensors:
                    raise ValueError(f"two tensors {name!r:.40}")
                self.tensors[name] = tensor
            elif number == 15:
                self.foreign.append("sparse tensors")
            elif number not in (2, 10, 11, 12, 13, 14, 16):
                self.foreign.append(f"field {number} of a graph")

    def _node(self, message: memoryview) -> None:
        operator = domain = ""
        inputs: list[str] = []
        outputs: list[str] = []
        attributes: dict[str, Attribute] = {}
        for number, wire_type, _, content in self._fields(message):
            if number == 1:
                inputs.append(_text(wire_type, content))
            elif number == 2:
                outputs.append(_text(wire_type, content))
            elif number == 4:
                operator = _text(wire_type, content)
            elif number == 7:
                domain = _text(wire_type, content)
                if domain not in _OWN_DOMAINS:
                    self.foreign.append(f"operators of {domain!r}")
            elif number == 5:
                name, value = self._attribute(_message(wire_type, content))
                if name in attributes:
                    raise ValueError(f"two attributes {name!r:.40}")
                attributes[name] = value
            elif number not in (3, 6, 9):
                self.foreign.append(f"field {number} of an operator")
        self.nodes.append(Node(operator, inputs, outputs, attributes))
        if operator not in OPERATORS and domain in _OWN_DOMAINS:
            self.foreign.append(f"the operator {operator!r}")

    def _attribute(self, message: memoryview) -> tuple[str, Attribute]:
        """Its name and value."""
        name = ""
        found: Attribute = None
        integers: list[int] = []
        for number, wire_type, value, content in self._fields(message):
            if number == 1:
                name = _text(wire_type, content)
            elif number == 3:
                found = value
            elif number == 4:
                found = _text(wire_type, content)
            elif number in (6, 11):
                self.foreign.append("a subgraph")
            elif number in (5, 10):
                self._tensor(_message(wire_type, content))
            elif number == 8:
                found = _extend(integers, wire_type, value, content)
            elif number not in (2, 7, 9, 13, 20):
                self.foreign.append(f"field {number} of an attribute")
        return name, found

    def _tensor(self, message: memoryview) -> tuple[str, Tensor]:
        name, raw = "", message[:0]
        shape: list[int] = []
        for number, wire_type, value, content in self._fields(message):
            if number == 1:
                _extend(shape, wire_type, value, content)
            elif number == 8:
                name = _text(wire_type, content)
            elif number == 9:
                raw = _message(wire_type, content)
            elif number == 13 or (number == 14 and value):
                self.foreign.append("data outside the file")
            elif number not in (2, 4, 5, 7, 10, 11, 12, 14, 16):
                self.foreign.append(f"field {number} of a tensor")
        if not 0 < math.prod(shape) <= len(message):
            self.foreign.append(f"a tensor of the shape {shape!r:.80} in {len(message):,} bytes")
        return name, Tensor(tuple(shape), raw)

    def _fields(self, message: memoryview) -> Iterator[Field]:
        at, nothing = 0, message[:0]
        while at < len(message):
            self.num_fields += 1
            if self.num_fields > _MAX_FIELDS:
                raise ValueError(f"over {_MAX_FIELDS:,} fields")
            key, at = _varint(message, at)
            number, wire_type = key >> 3, key & 7
            if wire_type == _VARINT:
                value, at = _varint(message, at)
                yield number, wire_type, value, nothing
            elif wire_type in (1, 5):
                at += 8 if wire_type == 1 else 4
                yield number, wire_type, 0, nothing
            elif wire_type == _LENGTH:
                length, at = _varint(message, at)
                yield number, wire_type, 0, message[at : at + length]
                at += length
            else:
                raise ValueError(f"wire type {wire_type}")
            if at > len(message):
                raise ValueError("a field ends behind its message")


def _message(wire_type: int, content: memoryview) -> memoryview:
    if wire_type != _LENGTH:
        raise ValueError(f"wire type {wire_type} where a message stands")
    return content


def _extend(integers: list[int], wire_type: int, value: int, content: memoryview) -> list[int]:
    """Add one integer, or those that are packed into one field."""
    if len(integers) >= _MAX_INTEGERS or len(content) > _MAX_INTEGERS:
        raise ValueError(f"a list of over {_MAX_INTEGERS} integers")
    if wire_type == _VARINT:
        integers.append(value)
        return integers
    at, packed = 0, _message(wire_type, content)
    while at < len(packed):
        value, at = _varint(packed, at)
        integers.append(value)
    return integers


def _text(wire_type: int, content: memoryview) -> str:
    return str(_message(wire_type, content), "utf-8")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("a number is cut off")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift >= 70:
            raise ValueError("a number has over ten bytes")

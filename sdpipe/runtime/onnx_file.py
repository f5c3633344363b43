"""What is in an ONNX file, read without onnx and before onnxruntime sees it.

Only what sdpipe exports is let through: no data outside the file, no subgraphs, no functions, and the
operators below. Numbers of fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto; encoding:
https://protobuf.dev/programming-guides/encoding
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
"""Of ONNX's own domain. None runs a subgraph, reads a file, draws at random, or makes much of little, but for
Pad's zero channels."""

_MAX_FIELDS = 1_000_000  # a 1202-layer file has 60,000; each costs a microsecond
_MAX_INTEGER = 4096
_BOUNDED = {"strides": 1, "dilations": 1, "kernel_shape": 1, "group": 1, "pads": 0}  # their least values
_PADDING = struct.Struct("<8q")  # before N, C, H, W and behind them
_OWN_DOMAINS = frozenset({"", "ai.onnx"})
_VARINT, _LENGTH = 0, 2  # wire types

Field = tuple[int, int, int, memoryview]
"""Number, wire type, value if it is a varint, bytes if it has a length."""


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """The parts of a file that say what onnxruntime would do with it."""

    operators: dict[str, int]  # how often each stands in the file, by name
    properties: dict[str, str]  # the metadata entries
    foreign: tuple[str, ...]  # what no file of ours holds, each once


def read_model_file(path: Path) -> bytes:
    """The bytes of a model file, which is read once: what was checked is what runs.

    Raises ModelError if it is missing, no regular file, larger than protobuf allows or cannot be read.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such model file; `make repro` makes models/model.onnx")
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                raise ModelError(f"{path}: {size:,} bytes, an ONNX file has at most {MAX_BYTES:,}")
            return stream.read(size)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def parse(raw: bytes, name: str) -> OnnxFile:
    """Read a file's structure. Raises ModelError naming `name` if it is damaged."""
    reader = _Reader()
    try:
        reader.model(memoryview(raw))
        reader.judge_paddings()
    except (IndexError, ValueError) as error:
        raise ModelError(f"{name}: damaged, or no ONNX file: {error}") from error
    return OnnxFile(
        operators=dict(sorted(reader.operators.items())),
        properties=reader.properties,
        foreign=tuple(dict.fromkeys(reader.foreign)),
    )


class _Reader:
    """Walks through every occurrence of every field: a later one may overrule or join an earlier one."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.properties: dict[str, str] = {}
        self.foreign: list[str] = []
        self.num_fields = 0
        self._paddings: list[str] = []  # names of the tensors that say how much Pad adds
        self._initializers: dict[str, bytes] = {}  # the small ones

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
                name, data = self._tensor(_message(wire_type, content))
                if name in self._initializers:
                    raise ValueError(f"two tensors {name!r}")
                self._initializers[name] = bytes(data) if len(data) <= _PADDING.size else b""
            elif number == 15:
                self.foreign.append("sparse tensors")
            elif number not in (2, 10, 11, 12, 13, 14, 16):
                self.foreign.append(f"field {number} of a graph")

    def _node(self, message: memoryview) -> None:
        operator = domain = ""
        inputs: list[str] = []
        for number, wire_type, _, content in self._fields(message):
            if number == 1:
                inputs.append(_text(wire_type, content))
            elif number == 4:
                operator = _text(wire_type, content)
            elif number == 7:
                domain = _text(wire_type, content)
                if domain not in _OWN_DOMAINS:
                    self.foreign.append(f"operators of {domain!r}")
            elif number == 5:
                self._attribute(_message(wire_type, content))
            elif number not in (2, 3, 6, 9):
                self.foreign.append(f"field {number} of an operator")
        self.operators[operator] += 1
        if operator == "Pad":
            self._paddings += inputs[1:2]
        if operator not in OPERATORS and domain in _OWN_DOMAINS:
            self.foreign.append(f"the operator {operator!r}")

    def judge_paddings(self) -> None:
        """Pad may add zero channels (option A), so many as a network has; it could fill the memory else."""
        for name in self._paddings:
            data = self._initializers.get(name, b"")
            padding = _PADDING.unpack(data) if len(data) == _PADDING.size else (-1,) * 8
            channels = padding[5]
            if padding != (0, 0, 0, 0, 0, channels, 0, 0) or not 0 <= channels <= _MAX_INTEGER:
                self.foreign.append("padding other than by channels")

    def _attribute(self, message: memoryview) -> None:
        name = ""
        integers: list[int] = []
        for number, wire_type, value, content in self._fields(message):
            if number == 1:
                name = _text(wire_type, content)
            elif number in (6, 11):
                self.foreign.append("a subgraph")
            elif number in (5, 10):
                self._tensor(_message(wire_type, content))
            elif number in (3, 8):
                integers += [value] if wire_type == _VARINT else self._varints(_message(wire_type, content))
            elif number not in (2, 4, 7, 9, 13, 20):
                self.foreign.append(f"field {number} of an attribute")
        # onnxruntime divides by these; a zero would end the process.
        if name in _BOUNDED and not all(_BOUNDED[name] <= value <= _MAX_INTEGER for value in integers):
            self.foreign.append(f"{name} {integers}")

    def _tensor(self, message: memoryview) -> tuple[str, memoryview]:
        """Its name and raw data."""
        name, raw_data = "", message[:0]
        for number, wire_type, value, content in self._fields(message):
            if number == 8:
                name = _text(wire_type, content)
            elif number == 9:
                raw_data = _message(wire_type, content)
            elif number == 13 or (number == 14 and value):
                self.foreign.append("data outside the file")
            elif number not in (1, 2, 4, 5, 7, 10, 11, 12, 14, 16):
                self.foreign.append(f"field {number} of a tensor")
        return name, raw_data

    def _varints(self, packed: memoryview) -> Iterator[int]:
        at = 0
        while at < len(packed):
            value, at = _varint(packed, at)
            yield value

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

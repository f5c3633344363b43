"""Opening a deployed ONNX file: the session, what the file says of itself, and its operators."""

import base64
import contextlib
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sdpipe.errors import DeviceError, ModelError
from sdpipe.runtime.metadata import Metadata

onnxruntime.set_default_logger_severity(3)  # errors; it warns about GPUs that a machine without them lacks

INPUT = "images"
OUTPUTS = ("logits", "probabilities")
SWITCHES = "switches"  # b_1..b_L, a second input that the sub-network ensemble alone has
ENSEMBLE = "ensemble"  # its variant


@dataclass(frozen=True, kw_only=True, eq=False)
class Artifact:
    """A deployed network, ready to run."""

    path: Path
    metadata: Metadata
    session: Any

    def run(
        self, images_NHWC: np.ndarray, switches_L: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits and probabilities, float32 (N, K), of uint8 images (N, H, W, C).

        switches_L: b_1..b_L, float32, for the sub-network ensemble only. Raises ModelError for an ensemble
        without them, and if onnxruntime cannot compute, as when a device's memory is full.
        """
        inputs = {INPUT: images_NHWC}
        if switches_L is not None:
            inputs[SWITCHES] = switches_L
        elif self.metadata.variant == ENSEMBLE:
            raise ModelError(
                f"{self.path}: is the sub-network ensemble, expected the model that it stands beside; "
                "`predict --uncertainty` uses both"
            )
        try:
            logits_NK, probabilities_NK = self.session.run(list(OUTPUTS), inputs)
        except _failures() as error:
            raise ModelError(f"{self.path}: onnxruntime fails: {_one_line(error)}") from error
        return logits_NK, probabilities_NK

    @property
    def providers(self) -> list[str]:
        """The onnxruntime providers that the session really uses."""
        return list(self.session.get_providers())


def open_artifact(path: Path, device: str = "auto", *, threads: int | None = None) -> Artifact:
    """Open a deployed file on `auto`, `cpu` or `cuda`.

    threads: that an operator is spread over, on the CPU; None: as many as onnxruntime takes for the machine.
    Raises ModelError if the file is missing, damaged or not ours, DeviceError if CUDA was asked for and does
    not work.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such model file; `make repro` makes models/model.onnx")
    use_cuda = device != "cpu" and cuda_works()
    if device == "cuda" and not use_cuda:
        raise DeviceError(
            "device cuda: no CUDA device here that onnxruntime can use; `sdpipe doctor` says more"
        )
    session = _open_session(path, ["CUDAExecutionProvider"] * use_cuda + ["CPUExecutionProvider"], threads)
    metadata = Metadata.from_properties(session.get_modelmeta().custom_metadata_map, str(path))
    _check_graph(session, metadata, path)
    return Artifact(path=path, metadata=metadata, session=session)


def _check_graph(session: Any, metadata: Metadata, path: Path) -> None:
    """The graph must take and give what the metadata says."""
    classes = len(metadata.class_names)
    switches = [(SWITCHES, "tensor(float)", [len(metadata.survival_probs)])]
    expected = [
        (INPUT, "tensor(uint8)", [*metadata.image_size, metadata.channels]),
        *(switches if metadata.variant == ENSEMBLE else []),
        *((name, "tensor(float)", [classes]) for name in OUTPUTS),
    ]
    values = [*session.get_inputs(), *session.get_outputs()]
    # All but the switches have the batch in front.
    found = [(value.name, value.type, list(value.shape[value.name != SWITCHES :])) for value in values]
    if found != expected:
        raise ModelError(f"{path}: its graph has {found}, its metadata say {expected}")


def _open_session(model: Path | bytes, providers: list[str], threads: int | None = None) -> Any:
    if "CUDAExecutionProvider" in providers:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's Python packages, where those are
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(model, options, providers=providers)
    except _failures() as error:
        named = model if isinstance(model, Path) else "model"
        raise ModelError(f"{named}: not a working ONNX file: {_one_line(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    # onnxruntime's exceptions have no common base of their own.
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = (
        "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded", "NoModel",
        "NoSuchFile", "NotImplemented", "RuntimeException",
    )  # fmt: skip
    return (RuntimeError, *(getattr(state, name) for name in names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# An ONNX file of one Relu on one number (ir 8, opset 18), to see whether a provider really computes.
_TINY_MODEL = base64.b64decode(
    "CAg6MwoMCgF4EgF5IgRSZWx1EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQEg=="
)


def provider_works(name: str) -> bool:
    """Run one operator on a provider: onnxruntime lists CUDA on every machine, and falls back in silence."""
    session = _open_session(_TINY_MODEL, [name])
    return bool(
        session.get_providers()[0] == name and session.run(None, {"x": np.full(1, -1, np.float32)})[0] == 0
    )


def cuda_works() -> bool:
    """Whether a CUDA device is here and onnxruntime computes on it. The driver is asked first."""
    return num_cuda_devices() > 0 and provider_works("CUDAExecutionProvider")


def num_cuda_devices() -> int:
    """How many devices the CUDA driver reports; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


# Field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_MODEL_GRAPH, _GRAPH_NODE, _NODE_OP_TYPE = 7, 1, 4


def count_operators(path: Path) -> dict[str, int]:
    """How often each operator stands in an ONNX file, by name; read from the file, without onnx.

    Raises ModelError if the file is damaged.
    """
    counts: Counter[str] = Counter()
    try:
        for graph in _fields(memoryview(path.read_bytes()), _MODEL_GRAPH):
            for node in _fields(graph, _GRAPH_NODE):
                counts.update(str(op, "utf-8") for op in _fields(node, _NODE_OP_TYPE))
    except (IndexError, ValueError) as error:
        raise ModelError(f"{path}: damaged ONNX file") from error
    return dict(sorted(counts.items()))


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The length-delimited fields `wanted` of a protobuf message (https://protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _, at = _varint(message, at)
        elif wire_type in (1, 5):
            at += 8 if wire_type == 1 else 4
        elif wire_type == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("truncated")
            if number == wanted:
                yield message[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {wire_type}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at

"""Opening a deployed ONNX file: the session, what the file says of itself, and its operators."""

import base64
import contextlib
import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sdpipe.errors import DeviceError, ModelError
from sdpipe.runtime import onnx_file
from sdpipe.runtime.cores import num_threads
from sdpipe.runtime.manifest import check_against_manifest
from sdpipe.runtime.metadata import Metadata
from sdpipe.runtime.onnx_file import OnnxFile
from sdpipe.runtime.shapes import BATCH, Shape, infer_shapes, most_numbers

onnxruntime.set_default_logger_severity(4)  # its errors come as exceptions; they are one line here

INPUT = "images"
OUTPUTS = ("logits", "probabilities")
SWITCHES = "switches"  # b_1..b_L, a second input that the sub-network ensemble alone has
ENSEMBLE = "ensemble"  # its variant


@dataclass(frozen=True, kw_only=True, eq=False)
class Artifact:
    """A deployed network, ready to run."""

    path: Path
    metadata: Metadata
    operators: dict[str, int]  # how often each stands in the file, by name
    session: Any

    def run(
        self, images_NHWC: np.ndarray, switches_L: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits and probabilities, float32 (N, K), of uint8 images (N, H, W, C).

        switches_L: b_1..b_L, float32, for the sub-network ensemble only. Raises ModelError for an ensemble
        without them, if onnxruntime cannot compute, as when a device's memory is full, and if what it made is
        not one row for each image.
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
        expected = (len(images_NHWC), len(self.metadata.class_names))
        for name, found in zip(OUTPUTS, (logits_NK.shape, probabilities_NK.shape), strict=True):
            if found != expected:
                raise ModelError(f"{self.path}: {name} of the shape {found}, expected {expected}")
        return logits_NK, probabilities_NK

    def probabilities(self, images_NHWC: np.ndarray, switches_L: np.ndarray | None = None) -> np.ndarray:
        """Those of `run` alone, to be shown to people. Raises ModelError also if one is no number."""
        _, probabilities_NK = self.run(images_NHWC, switches_L)
        if not np.isfinite(probabilities_NK).all():
            raise ModelError(
                f"{self.path}: its probabilities are no numbers; a weight is damaged, or too large"
            )
        return probabilities_NK

    @property
    def providers(self) -> list[str]:
        """The onnxruntime providers that the session really uses."""
        return list(self.session.get_providers())


def open_artifact(
    path: Path, device: str = "auto", *, threads: int | None = None, verify: bool = False
) -> Artifact:
    """Open a deployed file on `auto`, `cpu` or `cuda`; its bytes are read once, judged, and then run.

    threads: that an operator is spread over, on the CPU; None: one for each core that this process may use.
    verify: also compare it with the SHA256SUMS beside it. Raises ModelError if the file is missing, damaged,
    not ours or not the one in the manifest, DeviceError if CUDA was asked for and does not work.
    """
    raw = onnx_file.read_model_file(path)
    if verify:
        check_against_manifest(path, raw)
    structure = onnx_file.parse(raw, str(path))
    metadata = Metadata.from_properties(structure.properties, str(path))
    _check_structure(structure, metadata, path)
    use_cuda = device != "cpu" and cuda_works()
    if device == "cuda" and not use_cuda:
        raise DeviceError(
            "device cuda: no CUDA device here that onnxruntime can use; `sdpipe doctor` says more"
        )
    providers = ["CUDAExecutionProvider"] * use_cuda + ["CPUExecutionProvider"]
    session = _open_session(raw, providers, str(path), threads or num_threads())
    _check_graph(session, metadata, path)
    return Artifact(path=path, metadata=metadata, operators=structure.operators, session=session)


def _check_structure(structure: OnnxFile, metadata: Metadata, path: Path) -> None:
    """It may hold what sdpipe exports, and make of each image what that takes."""
    foreign = list(structure.foreign)
    uses = structure.operators.items()
    foreign += [f"{count:,} times {name}" for name, count in uses if count > onnx_file.MAX_USES]
    if not foreign:
        height, width = metadata.image_size
        inputs: dict[str, Shape] = {INPUT: (BATCH, height, width, metadata.channels)}
        if metadata.variant == ENSEMBLE:
            inputs[SWITCHES] = (len(metadata.survival_probs),)
        expected = (BATCH, len(metadata.class_names))
        try:
            made = infer_shapes(structure, inputs, most_numbers(height, width))
            foreign += [f"{name} {made.get(name)}" for name in OUTPUTS if made.get(name) != expected]
        except ValueError as error:
            foreign.append(str(error))
    if foreign:
        found = ", ".join(each[:150] for each in foreign[:3]) + ", ..." * (len(foreign) > 3)
        raise ModelError(f"{path}: holds what sdpipe does not export, so it is not run: {found}")


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
    for value in values:
        if value.name != SWITCHES and isinstance(value.shape[0], int):
            raise ModelError(f"{path}: its {value.name} are of {value.shape[0]} images, expected any number")


def _open_session(model: bytes, providers: list[str], name: str, threads: int) -> Any:
    if "CUDAExecutionProvider" in providers:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN from NVIDIA's Python packages, where those are
    options = onnxruntime.SessionOptions()
    # Without a number it binds a thread to each core of the machine, also where this process may use fewer,
    # and two processes wait for each other.
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Its threads wait for the next run in a loop, which holds a core for longer than a request takes to come,
    # and whatever computes beside it, such as PyTorch, may take a hundred times as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Else bytes that also look like its own format would be read as that, unjudged.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        # Its fallback prints to standard output and takes another device; a config in the model is not ours.
        return onnxruntime.InferenceSession(
            model, options, providers=providers, enable_fallback=0, read_config_from_model=0
        )
    except _failures() as error:
        raise ModelError(f"{name}: not a working ONNX file: {_one_line(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    # onnxruntime's exceptions have no common base of their own.
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = (
        "EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "ModelLoaded", "NoModel",
        "NoSuchFile", "NotImplemented", "RuntimeException",
    )  # fmt: skip
    # UnicodeDecodeError: its message quotes a damaged file.
    return (RuntimeError, UnicodeDecodeError, *(getattr(state, name) for name in names))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# An ONNX file of one Relu on one number (ir 8, opset 18), to see whether a provider really computes.
_TINY_MODEL = base64.b64decode(
    "CAg6MwoMCgF4EgF5IgRSZWx1EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQEg=="
)


def provider_works(name: str) -> bool:
    """Run one operator on a provider: onnxruntime lists CUDA on every machine, and falls back in silence."""
    try:
        session = _open_session(_TINY_MODEL, [name], name, threads=1)
    except ModelError:
        return False
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

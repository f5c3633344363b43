"""What a deployed file is measured beside: PyTorch eager and OpenVINO, each where it is installed."""

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from sdpipe.deploy.files_of_run import WEIGHTS, files_of_run
from sdpipe.errors import ModelError
from sdpipe.runtime.artifact import ENSEMBLE, INPUT, Artifact, open_artifact
from sdpipe.runtime.benchmark import Contender, onnx_contender
from sdpipe.runtime.metadata import Metadata
from sdpipe.runtime.signal_stack import kept_signal_stack


def open_for_benchmark(path: Path, device: str, threads: int) -> Artifact:
    """Open a deployed file to be timed. Raises ModelError, also for an ensemble, whose inputs are others."""
    artifact = open_artifact(path, device, threads=threads)
    if artifact.metadata.variant == ENSEMBLE:
        raise ModelError(f"{path}: an ensemble, which draws its sub-networks; files of one network are timed")
    return artifact


def weights_files(models: Path) -> list[Path]:
    """The weights of all runs, and those of their pruned networks; none where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return []
    runs = sorted(path.parent for path in models.glob(f"*/{WEIGHTS}"))
    return list(dict.fromkeys(one.weights for run in runs for one in files_of_run(run)))


def matching_weights(metadata: Metadata, candidates: Iterable[Path]) -> Path | None:
    """The weights file that a deployed file was made of: of the same run, with the same scales.

    Files that cannot be read are passed over.
    """
    for path in candidates:
        from sdpipe.training.weights import load_info  # PyTorch, only where there is a file for it

        try:
            info = load_info(path)
        except ModelError:
            continue
        if info.fingerprint == metadata.fingerprint and list(info.scales) == metadata.scales:
            return path
    return None


def openvino_contender(artifact: Artifact, threads: int) -> Contender | None:
    """The same ONNX file in OpenVINO, on the CPU; None where that is not installed.

    Raises ModelError if OpenVINO cannot compile it; its run does so if OpenVINO cannot run it.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # no bfloat16 where the processor has it: the same arithmetic
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    with _openvino_errors(artifact.path), kept_signal_stack():
        compiled = openvino.Core().compile_model(str(artifact.path), "CPU", options)
    request = compiled.create_infer_request()

    def run(images_NHWC: np.ndarray) -> object:
        with _openvino_errors(artifact.path):
            return request.infer({INPUT: images_NHWC})

    return replace(onnx_contender(artifact), engine="openvino", run=run)


@contextmanager
def _openvino_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ModelError(f"{path}: OpenVINO: {' '.join(str(error).split())[:200]}") from error


def eager_contenders(metadata: Iterable[Metadata], models: Path, threads: int) -> list[Contender]:
    """PyTorch eager on the weights of these deployed files, each weights file once."""
    candidates = weights_files(models)
    found = dict.fromkeys(
        path for each in metadata if (path := matching_weights(each, candidates)) is not None
    )
    if not found:
        return []
    import torch

    from sdpipe.deploy.timing.eager import eager_contender

    torch.set_num_threads(threads)
    return [eager_contender(path) for path in found]

"""The sections `calibrate`, `export`, `evaluate` and `deploy` of params.yaml."""

from typing import Annotated

from pydantic import Field

from sdpipe.config import Fraction, Section

BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]


class ExportConfig(Section):
    """How the ONNX file is written."""

    opset: Annotated[int, Field(ge=18, le=24)]  # ONNX operator set; runtimes read all older ones


class CalibrateConfig(Section):
    """How confidence is calibrated."""

    num_bins: Annotated[int, Field(ge=2, le=100)]  # of the reliability diagram, equal in width


class EvaluateConfig(Section):
    """What is proved of the ONNX file, and what is measured."""

    batch_sizes: BatchSizes  # the whole test set goes through at each
    max_relative_logit_diff: Annotated[float, Field(gt=0, lt=1)]  # of the reference's logit spread
    latency_batch_sizes: BatchSizes
    latency_repeats: Annotated[int, Field(ge=3)]  # timed calls of each kind, interleaved


class DeployConfig(Section):
    """Which run is shipped, and what is asked of it."""

    run: str
    max_test_error: Annotated[float, Field(gt=0, le=1)]  # fraction, of the ONNX file on the test set
    max_error_increase: Fraction  # over the fp32 file's test error, of the int8 and fp16 files
    max_pruned_error_increase: Fraction  # the same of files with fewer blocks, int8 ones too
    registered_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # its name in MLflow's registry

"""The sections `calibrate`, `export`, `prune`, `evaluate` and `deploy` of params.yaml."""

from typing import Annotated

from pydantic import Field

from sdpipe.config import Fraction, Section, Seed

BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]


class ExportConfig(Section):
    """How the ONNX file is written."""

    opset: Annotated[int, Field(ge=18, le=24)]  # ONNX operator set; runtimes read all older ones


class PruneConfig(Section):
    """How a run is pruned and re-calibrated."""

    keep: Annotated[tuple[Fraction, ...], Field(strict=False)]  # of the blocks; a file for each
    num_order: Annotated[int, Field(ge=1)]  # validation images on which blocks and scales are chosen
    num_candidates: Annotated[int, Field(ge=1)]  # blocks whose worth is measured again after each removal
    num_validation: Annotated[int, Field(ge=1)]  # validation images for the temperature and the errors
    num_statistics: Annotated[int, Field(ge=2)]  # training images for BatchNorm's statistics
    statistics_batch: Annotated[int, Field(ge=2)]  # images of one batch of them
    # t of the scales p_l + t (1 - p_l) that are tried
    scale_steps: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False, min_length=1)]
    seed: Seed  # of the choice of images


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

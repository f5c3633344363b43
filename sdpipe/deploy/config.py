"""The sections `calibrate`, `export`, `prune`, `quantize`, `evaluate` and `deploy` of params.yaml."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sdpipe.config import Fraction, Section, Seed


def _check_each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected each once, got {list(values)}")
    return values


_Several = (Field(strict=False, min_length=1), AfterValidator(_check_each_once))
"""Of a list; a second time would prove and measure nothing new."""
BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], *_Several]
Threads = Annotated[tuple[Annotated[int, Field(ge=1, le=256)], ...], *_Several]


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


class QuantizeConfig(Section):
    """How the int8 file finds the ranges of its activations."""

    images: Annotated[int, Field(ge=1)]  # of the training part
    seed: Seed  # which ones
    # Those that are tried; the closest to float on the validation part is taken.
    methods: Annotated[tuple[Literal["minmax", "entropy", "percentile"], ...], *_Several]
    percentile: Annotated[float, Field(gt=50, le=100)]  # of the values that the third covers


class Fp16Parity(Section):
    """How far a float16 file may be from its float32 file."""

    max_relative_logit_diff: Fraction  # of the logit spread


class Int8Parity(Section):
    """How far an int8 file may be from its float32 file. docs/parity.md says how the bounds were found."""

    max_relative_logit_diff: Annotated[float, Field(gt=0)]  # of the logit spread
    max_clipped: Fraction  # of an activation's values on the test images that are looked at
    max_range_ratio: Annotated[float, Field(gt=1)]  # width of an activation's range over that of its values
    min_sqnr_db: float  # signal to quantisation noise of each layer


class EvaluateConfig(Section):
    """What is proved of the ONNX files, and what is measured."""

    batch_sizes: BatchSizes  # the whole test set goes through at each, with threads[0]
    threads: Threads  # of an operator; at the others the last batch size
    max_relative_logit_diff: Fraction  # of float32 files, of the reference's logit spread
    max_probability_diff: Fraction  # from softmax(logits / T) in float64
    fp16: Fp16Parity
    int8: Int8Parity
    layer_images: Annotated[int, Field(ge=1)]  # of the test part, for what is looked at layer by layer
    latency_batch_sizes: BatchSizes
    latency_repeats: Annotated[int, Field(ge=3)]  # timed calls of each kind, interleaved


class DeployConfig(Section):
    """Which run is shipped, and what is asked of it."""

    run: str
    max_test_error: Annotated[float, Field(gt=0, le=1)]  # fraction, of the ONNX file on the test set
    max_error_increase: Fraction  # over the fp32 file's test error, of the int8 and fp16 files
    max_pruned_error_increase: Fraction  # the same of files with fewer blocks, int8 ones too
    registered_model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # its name in MLflow's registry

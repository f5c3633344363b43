"""The sections `train` and `machine` of params.yaml, with what a run in `runs` overrides."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from sdpipe.architecture import check_widths, groups_of
from sdpipe.config import Fraction, Section, Seed, parse_section
from sdpipe.errors import ConfigError
from sdpipe.network import NetworkConfig

PositiveInt = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0)]
Width = Annotated[int, Field(ge=1, le=65_536)]


def _check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"expected the smaller number first, got {list(interval)}")
    return interval


Interval = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]],
    Field(strict=False),
    AfterValidator(_check_interval),
]
"""Least and greatest value."""


def _within(least: float, greatest: float) -> AfterValidator:
    def check(interval: tuple[float, float]) -> tuple[float, float]:
        if not least <= min(interval) <= max(interval) <= greatest:
            raise ValueError(f"expected numbers from {least:g} to {greatest:g}, got {list(interval)}")
        return interval

    return AfterValidator(check)


class Warmup(Section):
    """A lower learning rate at the start (the 1202-layer recipe); 0 epochs: none."""

    epochs: Annotated[int, Field(ge=0)]
    learning_rate: LearningRate


class RandomSizeCrop(Section):
    """A box of random area and aspect ratio, resized to the image size (fb.resnet.torch)."""

    area: Annotated[Interval, _within(0, 1)]  # of the picture's
    aspect: Annotated[Interval, _within(0.1, 10)]  # width over height; turned upright with probability 1/2


class RandomScaleCrop(Section):
    """A box of the image size out of the picture at a random size (ResNet section 3.4)."""

    shorter_side: Annotated[Interval, _within(1, 10_000)]  # pixels that the picture's is resized to


class TrainConfig(Section):
    """Everything that decides one training."""

    dataset: str
    seed: Seed  # of every random draw
    # Of the training images, or images per class by part:
    validation: Fraction | Annotated[dict[str, PositiveInt], Field(min_length=1)]
    family: Literal["cifar", "imagenet"]  # depth 6n + 2 in three groups, or 18 to 152 in four
    depth: PositiveInt  # layers with weights
    widths: Annotated[tuple[Width, ...], Field(strict=False)]  # channels of the groups
    skip: Literal["A", "B", "C", "plain"]  # pooling and zeros; projection where shapes differ; always; none
    dropout: Annotated[float, Field(ge=0, lt=1)]  # in the branches; the papers' recipes have none
    rule: Literal["linear_decay", "uniform"]
    p_L: Annotated[float, Field(ge=1e-6, le=1)]  # survival probability of the last block; 1: constant depth
    p_L_warmup_epochs: Annotated[int, Field(ge=0)]  # p_L falls from 1 to its value over these; 0: at once
    draw: Literal["batch", "sample"]  # blocks are drawn for each mini-batch, or for each image
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]  # images of one step, over all processes
    validate_steps: Annotated[int, Field(ge=0)]  # steps between validations in an epoch; 0: at its end only
    micro_batches: PositiveInt  # parts of a batch, one after the other; BatchNorm normalises within a part
    learning_rate: LearningRate
    milestones: Annotated[tuple[PositiveInt, ...], Field(strict=False)]  # epochs after which it is divided
    plateau_epochs: Annotated[int, Field(ge=0)]  # without a lower validation error, then it is; 0: never
    drop_factor: Annotated[float, Field(gt=1)]  # by this
    warmup: Warmup
    momentum: Annotated[float, Field(ge=0, lt=1)]  # Nesterov, dampening 0
    weight_decay: Annotated[float, Field(ge=0)]  # on every parameter
    normalisation: Literal["pixel", "channel"]  # mean image and one deviation, or both for each channel
    crop: RandomSizeCrop | RandomScaleCrop | None  # of picture files; null: the centre, as in evaluation
    colour_jitter: Annotated[float, Field(ge=0, lt=1)]  # of brightness, contrast, saturation; 0: none
    lighting: Annotated[float, Field(ge=0)]  # standard deviation of random colour shifts; 0: none
    shift_px: Annotated[int, Field(ge=0)]  # largest random shift in each axis, pixels; 0: none
    flip: bool  # horizontal, with probability 1/2
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: bool  # torch.compile for each block's branch
    recompute: bool  # blocks are computed again in the backward pass: less memory, the same result

    @field_validator("depth")
    @classmethod
    def _check_depth(cls, depth: int, info: ValidationInfo) -> int:
        if "family" in info.data:
            groups_of(info.data["family"], depth)
        return depth

    @field_validator("widths")
    @classmethod
    def _check_widths(cls, widths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if "family" in info.data:
            check_widths(info.data["family"], widths)
        return widths

    @field_validator("p_L")
    @classmethod
    def _check_p_L(cls, p_L: float, info: ValidationInfo) -> float:
        if info.data.get("skip") == "plain" and p_L != 1:
            raise ValueError(f"expected 1 where skip is plain, since no block can be skipped, got {p_L}")
        return p_L

    @field_validator("epochs")
    @classmethod
    def _check_epochs(cls, epochs: int, info: ValidationInfo) -> int:
        if epochs <= (warmup := info.data.get("p_L_warmup_epochs", 0)):
            raise ValueError(f"expected more than the {warmup} of p_L_warmup_epochs, got {epochs}")
        return epochs

    @field_validator("micro_batches")
    @classmethod
    def _check_micro_batches(cls, micro_batches: int, info: ValidationInfo) -> int:
        batch_size, p_L = info.data.get("batch_size", math.inf), info.data.get("p_L", 1.0)
        least = _min_part(info.data.get("draw"), p_L)
        if batch_size // micro_batches < least:
            why = f", of which p_L {p_L} are 2, where draw is sample" if least > 2 else ""
            raise ValueError(
                f"expected parts of at least {least} images{why}; got {micro_batches} parts of {batch_size}"
            )
        return micro_batches

    @property
    def min_part(self) -> int:
        """Images that a part of a mini-batch has at least."""
        return _min_part(self.draw, self.p_L)

    @field_validator("milestones")
    @classmethod
    def _check_milestones(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError(f"expected rising epochs, got {list(milestones)}")
        return milestones

    @field_validator("plateau_epochs")
    @classmethod
    def _check_plateau_epochs(cls, plateau_epochs: int, info: ValidationInfo) -> int:
        if plateau_epochs and info.data.get("milestones"):
            raise ValueError(f"expected 0 beside milestones, which drop the rate too, got {plateau_epochs}")
        return plateau_epochs

    @field_validator("warmup")
    @classmethod
    def _check_warmup(cls, warmup: Warmup, info: ValidationInfo) -> Warmup:
        if warmup.epochs >= info.data.get("epochs", math.inf):
            raise ValueError(
                f"expected fewer epochs than the {info.data['epochs']} of train, got {warmup.epochs}"
            )
        return warmup

    def network_config(self, *, in_channels: int, num_classes: int) -> NetworkConfig:
        """The network for images of so many channels and classes."""
        return NetworkConfig(
            family=self.family,
            depth=self.depth,
            widths=self.widths,
            skip=self.skip,
            dropout=self.dropout,
            rule=self.rule,
            p_L=self.p_L,
            in_channels=in_channels,
            num_classes=num_classes,
        )


def _min_part(draw: str | None, p_L: float) -> int:
    """A block is computed for 2 images at least; drawn for each image, it survives for p_L of a part's."""
    return math.ceil(2 / p_L) if draw == "sample" else 2


class CheckpointConfig(Section):
    """When an unfinished training is saved."""

    every_s: Annotated[float, Field(gt=0)]  # seconds; stretched where it costs more than 2 % of the time
    every_steps: Annotated[int, Field(ge=0)]  # 0: by time only


class MachineConfig(Section):
    """How a training is run. No stage runs again for a change here."""

    workers: Annotated[int, Field(ge=0)] | None  # processes that decode picture files; null: one a core

    launch: Annotated[str, Field(min_length=1)] | None  # a launcher, such as torchrun --nproc-per-node 4
    checkpoint: CheckpointConfig


def parse_run(train: Any, runs: Any, run: str) -> TrainConfig:
    """The section `train` with the overrides of `runs.<run>`.

    Raises ConfigError naming the key where the fault stands.
    """
    if not isinstance(train, Mapping) or not isinstance(runs, Mapping):
        raise ConfigError("params.yaml: train and runs: expected mappings")
    if run not in runs:
        raise ConfigError(f"params.yaml: runs.{run}: missing; there are {', '.join(map(str, runs))}")
    overrides = runs[run] if runs[run] is not None else {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"params.yaml: runs.{run}: expected a mapping, got {overrides!r}")
    if "dataset" in overrides:
        raise ConfigError(
            f"params.yaml: runs.{run}.dataset: all runs share train.dataset, so that they compare"
        )
    return parse_section(
        TrainConfig, {**train, **overrides}, "train", {str(key): f"runs.{run}" for key in overrides}
    )

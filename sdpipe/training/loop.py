"""The training loop: one run, from arrays to the weights of the epoch with the lowest validation error.

N: images, K: classes. Images stay uint8 NHWC until their batch is made.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sdpipe.data.augment import Normalisation, fit_normalisation, shift_and_flip
from sdpipe.data.split import split_validation
from sdpipe.data.store import DataSet
from sdpipe.errors import DataError, TrainingError
from sdpipe.network import ResNet, initialise
from sdpipe.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws
from sdpipe.training.progress import EpochRecord, EpochTiming, Progress
from sdpipe.training.schedule import learning_rate_at
from sdpipe.training.weights import snapshot

EVALUATION_BATCH = 500  # images; only memory and speed depend on it
MAX_LINES = 20  # of progress where there is no terminal to draw a bar in


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome: weights of the best epoch, its test error, and how it went."""

    state: dict[str, Tensor]
    normalisation: Normalisation
    progress: Progress
    test_error: float
    num_train: int
    num_validation: int


OnEpoch = Callable[[Progress], None]


class Trainer:
    """A training in progress. Use `train()`."""

    def __init__(self, config: TrainConfig, dataset: DataSet, compute: Compute) -> None:
        self.config = config
        self.dataset = dataset
        self.compute = compute
        self.draws = Draws(config.seed)
        self.train_indices, self.validation_indices = split_validation(
            dataset.train_labels_N, dataset.train_parts, config.validation, config.seed
        )
        self.batch_size = config.batch_size
        self.steps_per_epoch = len(self.train_indices) // self.batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"train.batch_size: {self.batch_size} images asked for, {len(self.train_indices)} to train on"
            )
        self.normalisation = fit_normalisation(dataset.train_images_NHWC, self.train_indices)
        self.normalise = self.normalisation.to(compute.device)
        self.network = self._new_network()
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            dampening=0,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        # The paper's code steps all parameters from one zeroed gradient vector: an inactive block has
        # gradient 0, not None, so weight decay and momentum still move it.
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.watched_weight = self.network.get_parameter("blocks.0.branch.conv1.weight")  # figure 7
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}

    def _new_network(self) -> ResNet:
        channels = self.dataset.train_images_NHWC.shape[3]
        network = ResNet(
            self.config.network_config(in_channels=channels, num_classes=len(self.dataset.class_names))
        )
        initialise(network, self.config.seed)
        self.compute.place(network)
        return network

    def run_epoch(self, epoch: int, bar: "tqdm[Any]") -> None:
        """Train one epoch, validate, and note both."""
        started = time.perf_counter()
        learning_rate = learning_rate_at(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        trained = self._run_steps(epoch, bar)
        train_s = time.perf_counter() - started
        validated = self._validate()
        for name in ("train_loss", "validation_loss"):
            if not math.isfinite(value := (trained | validated)[name]):
                raise TrainingError(
                    f"epoch {epoch + 1}: {name} is {value} at learning rate {learning_rate}; "
                    "a lower learning rate or a warm-up helps"
                )
        record = EpochRecord(epoch=epoch + 1, learning_rate=learning_rate, **trained, **validated)
        timing = EpochTiming(
            epoch=epoch + 1,
            epoch_s=time.perf_counter() - started,
            images_per_s=self.steps_per_epoch * self.batch_size / train_s,
        )
        self.progress.history.append(record)
        self.progress.timing.append(timing)
        if self.progress.best is record:
            self.best_state = snapshot(self.network.state_dict())

    def _run_steps(self, epoch: int, bar: "tqdm[Any]") -> dict[str, float]:
        """The training steps of one epoch. Nothing in a step waits for the device."""
        self.network.train()
        probs = self.network.config.survival_probs
        loss_sum = torch.zeros((), device=self.compute.device)
        grad_sum = torch.zeros((), device=self.compute.device)
        num_grads = torch.zeros((), device=self.compute.device)
        num_active = 0
        for step, (images_NCHW, labels_N) in enumerate(self._batches(epoch)):
            active = self.draws.active_blocks(epoch, step, probs)
            with self.compute.autocast():
                loss = F.cross_entropy(self.network(images_NCHW, active), labels_N)
            torch.autograd.backward(self.scaler.scale(loss))
            self.scaler.unscale_(self.optimizer)
            loss_sum += loss.detach()
            num_active += sum(active)
            if active[0]:
                grad = _gradient(self.watched_weight).abs().mean()
                is_finite = torch.isfinite(grad)  # fp16 overflows now and then; the scaler skips such a step
                grad_sum += torch.where(is_finite, grad, 0)
                num_grads += is_finite
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=False)
            bar.update()
        return {
            "train_loss": loss_sum.item() / self.steps_per_epoch,
            "blocks_active": num_active / self.steps_per_epoch,
            "mean_abs_grad": grad_sum.item() / max(num_grads.item(), 1),
        }

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's mini-batches. Images that do not fill the last one are left out; each epoch others."""
        config, num = self.config, len(self.train_indices)
        order = self.draws.order(epoch, num)
        shifts_N2 = torch.from_numpy(self.draws.shifts(epoch, num, config.shift_px))
        flips_N = torch.from_numpy(self.draws.flips(epoch, num) if config.flip else np.zeros(num, dtype=bool))
        for start in range(0, self.steps_per_epoch * self.batch_size, self.batch_size):
            chosen = order[start : start + self.batch_size]
            images_NHWC, labels_N = self._upload(
                self.dataset.train_images_NHWC, self.dataset.train_labels_N, self.train_indices[chosen]
            )
            images_NHWC = self.normalise(images_NHWC)
            if config.shift_px or config.flip:
                shifts, flips = (self.compute.upload(draw[chosen]) for draw in (shifts_N2, flips_N))
                images_NHWC = shift_and_flip(images_NHWC, shifts, flips, config.shift_px)
            yield images_NHWC.permute(0, 3, 1, 2), labels_N

    def _upload(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, indices: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        upload = self.compute.upload
        return upload(torch.from_numpy(images_NHWC[indices])), upload(torch.from_numpy(labels_N[indices]))

    def _validate(self) -> dict[str, float]:
        with self.compute.autocast():
            error, loss = self.error_and_loss(
                self.dataset.train_images_NHWC, self.dataset.train_labels_N, self.validation_indices
            )
        return {"validation_error": error, "validation_loss": loss}

    @torch.no_grad()
    def error_and_loss(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, indices: np.ndarray
    ) -> tuple[float, float]:
        """Error fraction and mean cross-entropy of the test network (eq. 5) on the chosen images."""
        self.network.eval()
        wrong = torch.zeros((), device=self.compute.device)
        loss_sum = torch.zeros((), device=self.compute.device)
        for start in range(0, len(indices), EVALUATION_BATCH):
            batch_NHWC, labels = self._upload(
                images_NHWC, labels_N, indices[start : start + EVALUATION_BATCH]
            )
            logits_NK = self.network(self.normalise(batch_NHWC).permute(0, 3, 1, 2)).float()
            wrong += (logits_NK.argmax(dim=1) != labels).sum()
            loss_sum += F.cross_entropy(logits_NK, labels, reduction="sum")
        return wrong.item() / len(indices), loss_sum.item() / len(indices)

    def checkpoint(self) -> Checkpoint:
        """Everything the next epoch needs."""
        momentum = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.network.named_parameters()
        }
        groups = {"network": self.network.state_dict(), "best": self.best_state, "momentum": momentum}
        return Checkpoint(
            num_epochs=len(self.progress.history),
            tensors={
                f"{group}.{name}": tensor for group, named in groups.items() for name, tensor in named.items()
            },
            progress={**asdict(self.progress), "scaler": self.scaler.state_dict()},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same training."""
        groups: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}, "momentum": {}}
        for name, tensor in checkpoint.tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        self.network.load_state_dict(groups["network"])
        self.best_state = groups["best"]
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter]["momentum_buffer"].copy_(groups["momentum"][name])
        self.progress = Progress.from_json(checkpoint.progress)
        self.scaler.load_state_dict(checkpoint.progress["scaler"])

    def finish(self) -> TrainResult:
        """Measure the test error, once, at the epoch of lowest validation error, in fp32 (TF32 on CUDA)."""
        self.network.load_state_dict(self.best_state)
        test_images, test_labels = self.dataset.test_images_NHWC, self.dataset.test_labels_N
        test_error, _ = self.error_and_loss(test_images, test_labels, np.arange(len(test_labels)))
        return TrainResult(
            state=self.best_state,
            normalisation=self.normalisation,
            progress=self.progress,
            test_error=test_error,
            num_train=len(self.train_indices),
            num_validation=len(self.validation_indices),
        )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "gradients are zeroed, never None"
    return parameter.grad


def train(
    config: TrainConfig, dataset: DataSet, compute: Compute, checkpoints: Path, on_epoch: OnEpoch
) -> TrainResult:
    """Train one run, continuing from the newest whole checkpoint in `checkpoints`.

    checkpoints: a folder that only this very training writes to; one checkpoint an epoch.
    on_epoch: called after each epoch, and at the start of a continued run, with the progress so far.
    Raises DataError, TrainingError.
    """
    trainer = Trainer(config, dataset, compute)
    found, damaged = load_newest_checkpoint(checkpoints)
    for sentence in damaged:
        tqdm.write(sentence)
    if found is not None:
        trainer.restore(found)
        tqdm.write(f"continuing after epoch {found.num_epochs} of {config.epochs}")
        on_epoch(trainer.progress)
    first = len(trainer.progress.history)
    steps = trainer.steps_per_epoch
    with tqdm(total=config.epochs * steps, initial=first * steps, unit="step", disable=None) as bar:
        for epoch in range(first, config.epochs):
            trainer.run_epoch(epoch, bar)
            save_checkpoint(checkpoints, trainer.checkpoint())
            record = trainer.progress.history[-1]
            bar.set_postfix(
                epoch=f"{record.epoch}/{config.epochs}",
                loss=f"{record.train_loss:.3f}",
                error=f"{record.validation_error:.4f}",
                best=f"{trainer.progress.best.validation_error:.4f}",
            )
            if bar.disable and (epoch + 1) % max(1, config.epochs // MAX_LINES) == 0:
                print(
                    f"epoch {record.epoch}/{config.epochs}: loss {record.train_loss:.4f}, "
                    f"validation error {record.validation_error:.4f}",
                    flush=True,
                )
            on_epoch(trainer.progress)
    return trainer.finish()

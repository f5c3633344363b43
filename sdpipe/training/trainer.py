"""A training in progress: its state, the steps of an epoch, the end of an epoch.

N: images, K: classes. Images stay uint8 NHWC until their batch is made.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from sdpipe.data.store import DataSet
from sdpipe.errors import TrainingError
from sdpipe.network import ResNet, initialise
from sdpipe.segment import Active, Segment
from sdpipe.training.batches import Batches
from sdpipe.training.checkpoint import Checkpoint
from sdpipe.training.compute import Compute
from sdpipe.training.config import TrainConfig
from sdpipe.training.draws import Draws
from sdpipe.training.evaluation import error_and_loss
from sdpipe.training.images import ArrayImages, agreed
from sdpipe.training.inputs import check_fits, fit_to, open_images, split
from sdpipe.training.progress import EpochRecord, EpochTiming, Progress, Sums, TrainResult
from sdpipe.training.schedule import learning_rate_at, survival_probs_at
from sdpipe.training.step import PartDraws, TrainingStep
from sdpipe.training.weights import snapshot
from sdpipe.training.world import World


class Trainer:
    """Everything that a step changes, and how. Use `train()`."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: DataSet,
        compute: Compute,
        world: World,
        workers: int | None = None,
    ) -> None:
        """workers: processes that decode picture files; None: one a core."""
        check_fits(config, dataset, compute)
        self.config = config
        self.dataset = dataset
        self.compute = compute
        self.world = world
        self.draws = Draws(config.seed)
        self.train_indices, self.validation_indices = split(config, dataset)
        self.steps_per_epoch = len(self.train_indices) // config.batch_size
        self.images = open_images(config, dataset, compute, workers)
        self.normalisation = fit_to(config, dataset, self.train_indices, self.images)
        self.normalise = self.normalisation.to(compute.device)
        self.network = self._new_network()
        self.step = TrainingStep(config, self.network, compute, world)
        self.batches = Batches(config, self.images, self.train_indices, self.normalise, compute)
        self.watched_weight = self.network.get_parameter("blocks.0.branch.conv1.weight")  # figure 7
        self.progress = Progress(hardware=[compute.hardware(world.size)])
        self.best_state: dict[str, Tensor] = {}
        self.sums = Sums.zero(compute.device)

    def _new_network(self) -> ResNet:
        channels = self.dataset.image_shape_HWC[2]
        network = ResNet(
            self.config.network_config(in_channels=channels, num_classes=len(self.dataset.class_names))
        )
        initialise(network, self.config.seed)
        self.compute.place(network)
        return network

    @property
    def epoch(self) -> int:
        """The epoch in progress, from 0."""
        return self.progress.epochs_done

    @property
    def learning_rate(self) -> float:
        """That of the epoch in progress."""
        return learning_rate_at(self.config, self.epoch, self.progress.epoch_errors)

    @property
    def num_steps(self) -> int:
        """Steps of all epochs so far."""
        return self.epoch * self.steps_per_epoch + self.sums.num_steps

    @property
    def lacks_validation_only(self) -> bool:
        """Whether all steps before the next validation are taken."""
        return self.sums.num_steps == self._validation_step

    @property
    def _validation_step(self) -> int:
        """The step of the epoch behind which the next validation is due."""
        every = self.config.validate_steps or self.steps_per_epoch
        return min(self.sums.first_step // every * every + every, self.steps_per_epoch)

    def steps(self) -> Iterator[None]:
        """Take the steps that are still lacking before the next validation; yields after each.

        Raises TrainingError before the update, if a loss or a gradient is not finite; LoadingError before the
        step, in all processes, if one of them lacks its images.
        """
        epoch, sums = self.epoch, self.sums
        learning_rate = self.learning_rate
        sums.last_tick = time.perf_counter()
        steps = range(sums.num_steps, self._validation_step)
        batches = self.batches.epoch(epoch, steps, self.step.parts)
        is_sure = isinstance(self.images, ArrayImages)
        for parts in batches if is_sure else agreed(batches, self.world):
            draw = cache(partial(self._draw, epoch, sums.num_steps))  # asked again for the history
            loss = self.step.run(self.num_steps, parts, draw, learning_rate)
            if loss is None:
                self.check_finite()
            else:
                sums.loss += loss
            active = draw(0).active  # of the first part, where this process leads; its sums are kept
            sums.num_active += _blocks_active(active, len(parts[0][1]))
            if active[0]:
                assert self.watched_weight.grad is not None, "gradients are zeroed, never None"
                grad = self.watched_weight.grad.abs().mean()
                is_finite = torch.isfinite(grad)  # fp16 overflows now and then; the scaler skips such a step
                sums.gradient += torch.where(is_finite, grad, 0)
                sums.num_gradients += is_finite
            self.step.clear_gradients()
            sums.num_steps += 1
            sums.tick()
            yield

    def _draw(self, epoch: int, step: int, part: int) -> PartDraws:
        probs = survival_probs_at(self.config, len(self.network.blocks), epoch)
        images = self.step.all_parts[part]
        active: Sequence[Active] = (
            self.draws.segments(epoch, step, part, probs, images.stop - images.start)
            if self.config.draw == "sample"
            else self.draws.active_blocks(epoch, step, probs)
        )
        if not self.config.dropout:
            return PartDraws(active=active)
        keys_LN = self.draws.dropout_keys(epoch, step, len(probs), self.config.batch_size)
        return PartDraws(active=active, dropout_keys_LN=keys_LN[:, images])

    def check_finite(self) -> None:
        """Raise TrainingError if a step's loss or gradient was not finite. Waits for the device."""
        bad = self.step.guard.bad_step(wait=True)
        if bad is None:
            return
        number, loss, norm = bad
        epoch, step = divmod(number, self.steps_per_epoch)
        raise TrainingError(
            f"epoch {epoch + 1}, step {step + 1} of {self.steps_per_epoch}: loss {loss:g}, "
            f"gradient norm {norm:g} at learning rate {self.learning_rate:g}, on training "
            f"images {self.batches.indices(epoch, step).tolist()}; nothing of this step is kept, and an "
            "earlier checkpoint, if there is one, is good; a lower learning rate or a warm-up helps"
        )

    def validate(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Validate, note it with what was added up since the last time, keep the best.

        Returns False, with nothing changed, if `stop` says so in between; raises as `error_and_loss`.
        """
        self.check_finite()
        loss, gradient, num_gradients = (
            scalar.item() for scalar in (self.sums.loss, self.sums.gradient, self.sums.num_gradients)
        )
        self.sums.tick()
        started = time.perf_counter()
        with self.compute.autocast():
            validated = error_and_loss(
                self.network, self.images, self.validation_indices, self.normalise, self.world, stop
            )
        if validated is None:
            return False
        if not math.isfinite(validated[1]):
            raise TrainingError(
                f"epoch {self.epoch + 1}: the validation loss is {validated[1]:g} at learning rate "
                f"{self.learning_rate:g}; a lower learning rate or a warm-up helps"
            )
        sums = self.sums
        num_steps, is_whole = sums.num_steps - sums.first_step, sums.num_steps == self.steps_per_epoch
        record = EpochRecord(
            epoch=self.epoch + (1 if is_whole else sums.num_steps / self.steps_per_epoch),
            learning_rate=self.learning_rate,
            train_loss=loss / num_steps,
            validation_error=validated[0],
            validation_loss=validated[1],
            blocks_active=sums.num_active / num_steps,
            mean_abs_grad=gradient / max(num_gradients, 1),
        )
        timing = EpochTiming(
            epoch=record.epoch,
            epoch_s=sums.train_s + time.perf_counter() - started,
            images_per_s=num_steps * self.config.batch_size / sums.train_s,
        )
        self.progress.history.append(record)
        self.progress.timing.append(timing)
        if self.progress.best is record and self.world.leads:
            self.best_state = snapshot(self.network.state_dict())
        self.sums = Sums.zero(self.compute.device, 0 if is_whole else sums.num_steps)
        return True

    def checkpoint(self) -> Checkpoint:
        """Everything the next step needs. Raises TrainingError if the state is not finite."""
        self.check_finite()
        sums = self.sums
        tensors = {
            f"{group}.{name}": tensor
            for group, named in (*self._groups().items(), ("best", self.best_state))
            for name, tensor in named.items()
        }
        bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise TrainingError(
                f"after step {self.num_steps}: {bad[0]} and {len(bad) - 1} other tensors are not finite, and "
                "not saved; an earlier checkpoint, if there is one, is good; a lower learning rate or a "
                "warm-up helps"
            )
        return Checkpoint(
            num_steps=self.num_steps,
            is_unvalidated=self.lacks_validation_only,
            tensors=tensors,
            state={
                **asdict(self.progress),
                "scaler": self.step.scaler.state_dict(),
                "epoch": {
                    "first_step": sums.first_step,
                    "num_steps": sums.num_steps,
                    "num_active": sums.num_active,
                    "train_s": sums.train_s,
                },
            },
        )

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        """The tensors in which a training goes on; `restore` writes into them."""
        sums = self.sums
        return {
            "network": self.network.state_dict(),
            "momentum": self.step.momentum(),
            "sums": {"loss": sums.loss, "gradient": sums.gradient, "num_gradients": sums.num_gradients},
        }

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Continue from a checkpoint of this training. Only the leader has it; the others take its state."""
        state = self.world.take_object_from_leader(None if checkpoint is None else checkpoint.state)
        if state is None:
            return
        assert isinstance(state, dict)
        self.progress = Progress.from_json(state).continued_on(self.progress.hardware)
        for name, value in state["epoch"].items():
            setattr(self.sums, name, value)
        self.step.scaler.load_state_dict(state["scaler"])
        own = {f"{group}.{name}": at for group, named in self._groups().items() for name, at in named.items()}
        if checkpoint is not None:
            for name, tensor in checkpoint.tensors.items():
                if name.startswith("best."):
                    self.best_state[name.removeprefix("best.")] = tensor
                else:
                    own.pop(name).copy_(tensor)
            assert not own, f"the checkpoint lacks {', '.join(own)}"
        self.world.take_from_leader([at for named in self._groups().values() for at in named.values()])

    def finish(self) -> TrainResult:
        """Measure the test error, once, at the epoch of lowest validation error, in fp32 (TF32 on CUDA)."""
        if self.world.leads:
            self.network.load_state_dict(self.best_state)
        self.world.take_from_leader(list(self.network.state_dict().values()))
        test = ArrayImages(self.dataset.test_images_NHWC, self.dataset.test_labels_N, self.compute)
        measured = error_and_loss(
            self.network, test, np.arange(len(self.dataset.test_labels_N)), self.normalise, self.world
        )
        assert measured is not None
        return TrainResult(
            state=self.best_state,
            normalisation=self.normalisation,
            progress=self.progress,
            test_error=measured[0],
            num_train=len(self.train_indices),
            num_validation=len(self.validation_indices),
        )


def _blocks_active(active: Sequence[Active], num_images: int) -> float:
    """Active blocks; where they are drawn for each image, their mean over the images of one part."""
    return sum(
        min(each.count, num_images) / num_images if isinstance(each, Segment) else each for each in active
    )

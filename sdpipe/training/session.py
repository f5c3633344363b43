"""One training as a process: its name, its lock, its checkpoints, its MLflow run, its end."""

import errno
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from sdpipe.data.store import DataSet
from sdpipe.errors import BusyError, TrainingError
from sdpipe.files import work_folder
from sdpipe.provenance import git_state
from sdpipe.training.checkpoint import Checkpoint, CheckpointFolder
from sdpipe.training.compute import Compute, choose_compute
from sdpipe.training.config import MachineConfig, TrainConfig
from sdpipe.training.finished import LENGTH_KEYS, Lineage
from sdpipe.training.interruption import ENDING_S, Interruption, noticing_signals, say
from sdpipe.training.loop import train
from sdpipe.training.progress import Progress, TrainResult
from sdpipe.training.records import progress_metrics, start_record
from sdpipe.training.run_files import write_training
from sdpipe.training.setting import Setting
from sdpipe.training.tracking import LiveTracker
from sdpipe.training.weights import ModelInfo
from sdpipe.training.world import World, joined_world


def train_run(
    run: str,
    config: TrainConfig,
    machine: MachineConfig,
    dataset: DataSet,
    code: str,
    folder: Path,
    *,
    committed_md5: str | None = None,
) -> None:
    """Train a run and write its files to `folder`, or continue where a killed process stopped.

    code: digest of the source files that decide the result. committed_md5: of the run's weights as DVC has
    them; a finished training with these is done again, another one is the end of a stage that was killed.
    Raises BusyError if another process trains the same run, and what `train()` raises. An interruption leaves
    a checkpoint and an honest status.
    """
    with joined_world(config.device) as world, memory_on_one_line(config):
        compute = choose_compute(config.device, config.precision, world.local_rank)
        session = _Session(run, config, machine, dataset, compute, code, committed_md5)
        if world.leads:
            session.lead(world, folder)
        else:
            session.follow(world)


class _Session:
    """What a training is called and where it works."""

    def __init__(
        self,
        run: str,
        config: TrainConfig,
        machine: MachineConfig,
        dataset: DataSet,
        compute: Compute,
        code: str,
        committed_md5: str | None,
    ) -> None:
        self.committed_md5 = committed_md5
        self.run = run
        self.config = config
        self.machine = machine
        self.dataset = dataset
        self.compute = compute
        self.params = json.loads(json.dumps(config.model_dump()))
        self.setting = Setting(
            run=run, params=self.params, data=dataset.digest, code=code, compute=_decisive(compute)
        )
        self.name = self.setting.fingerprint()
        lineage = self.setting.fingerprint(without=LENGTH_KEYS)
        self.checkpoints = CheckpointFolder(work_folder() / "runs" / self.name, self.name, self.setting)
        self.lineage = Lineage(work_folder() / "finished" / lineage)

    def follow(self, world: World) -> None:
        """Compute this process's share; the leader does everything else."""
        with noticing_signals(lambda: None) as interruption:
            train(
                self.config,
                self.dataset,
                self.compute,
                world,
                checkpoints=None,
                machine=self.machine,
                start=None,
                on_epoch=lambda _progress: None,
                interruption=interruption,
            )

    def lead(self, world: World, folder: Path) -> None:
        """Train, save, track, and write the run's files to `folder`."""
        measured = {
            "compute": self.compute.reason,
            **git_state(Path()),  # of a copy, where `dvc exp` made one
        }
        processes = f", {world.size} processes" if world.size > 1 else ""
        say(f"run {self.run}, fingerprint {self.name}: {self.compute.reason}{processes}")
        if late := [str(each) for each in self.config.milestones if each >= self.config.epochs]:
            say(
                f"run {self.run}: no drop of the learning rate after epochs {', '.join(late)}, "
                f"since train.epochs is {self.config.epochs}"
            )
        unfinished = self.checkpoints.folder
        unfinished.parent.mkdir(exist_ok=True)
        record = start_record(
            self.run,
            fingerprint=self.name,
            data_digest=self.dataset.digest,
            train_params=self.params,
            git=measured,
            hardware=self.compute.hardware(world.size),
        )
        with _locked(unfinished.with_suffix(".lock"), self.run):
            tracker = LiveTracker(record)

            def give_up() -> None:
                tracker.close("KILLED", patience_s=interruption.remaining_s())

            # The signals are noticed to the very end, so that none cuts the last word to MLflow short.
            with (
                noticing_signals(give_up) as interruption,
                _told_how_it_ends(tracker, self._how_to_continue(), interruption),
            ):
                result = self._train(world, tracker, interruption)
                if interruption.requested:  # behind the last step; its state is saved
                    interruption.end()
                info = self._describe(result.progress)
                write_training(folder, result, info, measured)
                self.lineage.keep(self.checkpoints, folder / "weights.safetensors")
                tracker.close("FINISHED", {"test_error": result.test_error})
        if interruption.requested:
            interruption.end()
        say(
            f"run {self.run}: test error {result.test_error:.4f} at epoch {info.best_epoch:g}, "
            f"the one of lowest validation error ({result.progress.best.validation_error:.4f})"
        )

    def _train(self, world: World, tracker: LiveTracker, interruption: Interruption) -> TrainResult:
        return train(
            self.config,
            self.dataset,
            self.compute,
            world,
            checkpoints=self.checkpoints,
            machine=self.machine,
            start=self._find_start(self.compute.hardware(world.size)),
            on_epoch=lambda progress: tracker.update(progress_metrics(progress)),
            interruption=interruption,
        )

    def _find_start(self, hardware: str) -> Checkpoint | None:
        """The newest whole checkpoint of this training, else the end of one that it extends.

        Where there is neither, people are told of the last training of that name, and what it differs in.
        """
        found, told = self.checkpoints.load_newest()
        if found is None:
            found, told_of_finished = self.lineage.find_start(self.name, self.config, self.committed_md5)
            told += told_of_finished or self._told_of_another()
        for sentence in told:
            say(f"run {self.run}: {sentence}")
        if found is not None:
            progress = Progress.from_json(found.state)
            epochs = f"{progress.epochs_done} of {self.config.epochs} epochs"
            say(f"run {self.run}: continuing after step {found.num_steps}, {epochs}")
            if progress.hardware[-1] != hardware:
                say(f"run {self.run}: on {hardware}, after {progress.hardware[-1]}: rounding may be another")
        return found

    def _told_of_another(self) -> list[str]:
        """A sentence on the newest training of this name that cannot be continued here, if there is one."""
        if self.lineage.has(self.name):
            return []  # done again on purpose
        work = work_folder()
        folders = [*work.glob("runs/[!.]*/"), *work.glob("finished/*/[!.]*/")]
        for folder in sorted((path for path in folders if path.is_dir()), key=_written_at, reverse=True):
            there = CheckpointFolder(folder, folder.name).peek()
            if there is not None and there[1].run == self.run:
                kind = "unfinished" if folder.parent.name == "runs" else "finished"
                return [
                    f"the {kind} training {folder.name} of {there[0]} steps is another one: "
                    f"{self.setting.differences(there[1])}; starting from the beginning"
                ]
        return []

    def _how_to_continue(self) -> str:
        """`dvc repro` itself brings back what dvc.lock has; a training that is done again needs its -f.

        With -s, or it would do the other runs again as well.
        """
        is_again = self.committed_md5 is not None and self.lineage.has(self.name, self.committed_md5)
        command = f"dvc repro -f -s train@{self.run}" if is_again else "dvc repro"
        return f"run {self.run}: stopped; `{command}` continues from here"

    def _describe(self, progress: Progress) -> ModelInfo:
        dataset, config = self.dataset, self.config
        height, width, channels = dataset.image_shape_HWC
        network = config.network_config(in_channels=channels, num_classes=len(dataset.class_names))
        return ModelInfo(
            network=network,
            scales=network.survival_probs,
            dataset=dataset.name,
            dataset_digest=dataset.digest,
            class_names=dataset.class_names,
            image_size=(height, width),
            crop_fraction=dataset.crop_fraction,
            fingerprint=self.name,
            best_epoch=progress.best.epoch,
            train_params=self.params,
        )


def _written_at(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _decisive(compute: Compute) -> dict[str, str]:
    """What of the machine decides the result."""
    return {"device": compute.device.type, "precision": compute.precision, "torch": torch.__version__}


def _locked(path: Path, run: str) -> AbstractContextManager[FileLock]:
    """Hold the run's lock. A process that is ending, as when its DVC was killed, is waited for."""
    lock = FileLock(path)
    with suppress(Timeout):
        return lock.acquire(timeout=0)
    say(f"run {run}: another process is training it; waiting {ENDING_S:.0f} s for it to end")
    try:
        return lock.acquire(timeout=ENDING_S)
    except Timeout:
        raise BusyError(
            f"run {run}: another process is training it (lock {path}); wait for it or end it"
        ) from None


@contextmanager
def _told_how_it_ends(tracker: LiveTracker, stopped: str, interruption: Interruption) -> Iterator[None]:
    """Close the MLflow run as FAILED or KILLED when the block does not end well."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        interruption.allow_last_words()
        tracker.close("KILLED", patience_s=interruption.remaining_s())
        say(stopped)
        raise
    except Exception:
        tracker.close("FAILED")
        raise


@contextmanager
def memory_on_one_line(config: TrainConfig) -> Iterator[None]:
    """Turn an allocation that fails, on the host or the device, or a thread, into a TrainingError."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if str(error) == "can't start new thread":
            raise TrainingError(
                "no thread can be started: memory or the number of processes (`ulimit -u`) is short; "
                "a checkpoint, if there is one, is good"
            ) from error
        if not _is_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory at train.batch_size {config.batch_size} in {config.micro_batches} parts; "
            "a checkpoint, if there is one, is good; more train.micro_batches need less memory"
        ) from error


def _is_of_memory(error: BaseException | None) -> bool:
    """Or arose while one of memory was handled, as where the capture of a CUDA graph is given up."""
    if error is None:
        return False
    # PyTorch has a class of its own for its allocator on the device only.
    phrases = ("can't allocate memory", "STATUS_ALLOC_FAILED", "out of memory", "bad_alloc")
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(phrase in str(error) for phrase in phrases)
        or str(error) == "could not create a primitive"  # oneDNN's
        or _is_of_memory(error.__context__)
    )

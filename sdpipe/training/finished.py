"""Finished trainings, each with its last state, in `.sdpipe/finished/`: more epochs can continue them.

`.sdpipe/finished/<lineage>/<fingerprint>/` holds one checkpoint, and in `weights.md5` the MD5 of the weights
that it ended in. A lineage is what two trainings share that differ at most in their number of epochs and in
their milestones. Runs of one lineage may end and begin at the same time, so all is done under a lock.
"""

import errno
import hashlib
import math
import shutil
from pathlib import Path

from filelock import FileLock

from sdpipe.files import replacing_folder, write_synced
from sdpipe.training.checkpoint import Checkpoint, CheckpointFolder, remove_folder
from sdpipe.training.config import TrainConfig
from sdpipe.training.progress import Progress
from sdpipe.training.schedule import learning_rate_at

LENGTH_KEYS = ("epochs", "milestones")  # of `train`; what else differs makes another lineage
_MD5 = "weights.md5"  # DVC's digest


class Lineage:
    """The finished trainings that share all but their length."""

    def __init__(self, folder: Path) -> None:
        """folder: `.sdpipe/finished/<lineage>`; it need not exist."""
        self.folder = folder

    def keep(self, checkpoints: CheckpointFolder, weights_path: Path) -> None:
        """Move a finished training's newest checkpoint here, and remove the others.

        weights_path: of the weights that it ended in.
        """
        newest, *older = checkpoints.paths()
        kept = self.folder / checkpoints.fingerprint
        with self._locked():
            if kept.exists():
                remove_folder(kept)
            kept.mkdir()
            digest = hashlib.md5(weights_path.read_bytes(), usedforsecurity=False).hexdigest()
            write_synced(kept / _MD5, digest.encode())
            _move(newest, kept / newest.name)
        for path in older:
            remove_folder(path)
        shutil.rmtree(checkpoints.folder.resolve())
        checkpoints.folder.unlink(missing_ok=True)  # where it was a link

    def has(self, fingerprint: str, md5: str | None = None) -> bool:
        """Whether that training has finished; with these weights, if their MD5 is given."""
        path = self.folder / fingerprint / _MD5
        return path.is_file() and (md5 is None or path.read_bytes() == md5.encode())

    def find_start(
        self, fingerprint: str, config: TrainConfig, committed_md5: str | None
    ) -> tuple[Checkpoint | None, list[str]]:
        """The finished training from which `config` goes on, and sentences for people.

        That is its own end, if DVC does not have it yet: the stage was killed behind the training. If DVC has
        it (committed_md5 is that of its weights), who asks for it again wants it done again, from the start.
        Else, or where that end is damaged, it is the longest one that has had, in each epoch, the learning
        rate that `config` asks for.
        Raises TrainingError where one cannot be read.
        """
        if not self.folder.exists():
            return None, []
        with self._locked():
            if committed_md5 is not None and self.has(fingerprint, committed_md5):
                return None, []
            own = self.folder / fingerprint
            if own.is_dir():  # without its MD5 a process was killed as it kept this
                found, damaged = CheckpointFolder(own, fingerprint).read_newest()
                if found is not None:
                    return found, list(damaged.values())
            return self._find_extendable(config)

    def _find_extendable(self, config: TrainConfig) -> tuple[Checkpoint | None, list[str]]:
        found: Checkpoint | None = None
        told: list[str] = []
        refused: list[str] = []
        # Hidden is what a killed process left half-removed.
        for folder in sorted(path for path in self.folder.glob("[!.]*") if path.is_dir()):
            checkpoint, damaged = CheckpointFolder(folder, folder.name).read_newest()
            told += damaged.values()
            if checkpoint is None:
                continue
            progress = Progress.from_json(checkpoint.state)
            what = f"the finished training {folder.name} of {progress.epochs_done} epochs"
            reason = _reason_against(progress, checkpoint.state["epoch"]["num_steps"], config)
            if reason is not None:
                refused.append(f"{what} cannot be extended: {reason}; starting from the beginning")
            elif found is None or checkpoint.num_steps > found.num_steps:
                found, extending = checkpoint, f"extending {what}"
        return found, [*told, *(refused if found is None else [extending])]

    def _locked(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder.with_suffix(".lock"))


def _move(source: Path, target: Path) -> None:
    """A folder of files, also to another disk: checkpoints may stand on one, behind a link."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing_folder(target) as beside:
            for path in source.iterdir():
                write_synced(beside / path.name, path.read_bytes())


def _reason_against(progress: Progress, steps_begun: int, config: TrainConfig) -> str | None:
    """steps_begun: of the epoch behind the last whole one, whose learning rate nothing tells."""
    if steps_begun:
        return f"it ends within epoch {progress.epochs_done + 1}"
    if progress.epochs_done > config.epochs:
        return f"params.yaml asks for {config.epochs}"
    for record in progress.history:
        epoch = math.ceil(record.epoch)
        asked = learning_rate_at(config, epoch - 1, progress.epoch_errors)
        if record.learning_rate != asked:
            return (
                f"its learning rate in epoch {epoch} was {record.learning_rate:g}, "
                f"params.yaml asks for {asked:g}"
            )
    return None

"""Finished trainings that can be extended to more epochs: their last state, kept in `.sdpipe/finished/`.

`.sdpipe/finished/<lineage>/<fingerprint>/` holds one checkpoint. A lineage is what two trainings share that
differ at most in their number of epochs and their milestones.
"""

import shutil
from pathlib import Path
from typing import Any

from sdpipe.training.checkpoint import Checkpoint, CheckpointFolder
from sdpipe.training.config import TrainConfig
from sdpipe.training.schedule import learning_rate_at

LENGTH_KEYS = ("epochs", "milestones")  # of `train`; what else differs makes another lineage


def keep_finished(checkpoints: Path, kept: Path) -> None:
    """Move a finished training's newest checkpoint to `kept`, in the place of an earlier one there."""
    for old in sorted(checkpoints.iterdir(), reverse=True)[1:]:
        shutil.rmtree(old)
    if kept.exists():
        shutil.rmtree(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.rename(kept)


def find_extendable(
    lineage: Path, fingerprint: str, config: TrainConfig
) -> tuple[Checkpoint | None, list[str]]:
    """The longest finished training that `config` extends, and sentences for people.

    fingerprint: of the training that `config` asks for; a finished one of that name is not taken, since who
    asks for it again wants it done again. It can be extended if it has had, in each of its epochs, the
    learning rate that `config` asks for there.
    """
    found: Checkpoint | None = None
    told: list[str] = []
    refused: list[str] = []
    for folder in sorted(set(lineage.glob("*")) - {lineage / fingerprint}):
        checkpoint, damaged = CheckpointFolder(folder, folder.name).load_newest()
        told += damaged
        if checkpoint is None:
            continue
        history = checkpoint.state["history"]
        reason = _reason_against(history, config)
        if reason is not None:
            refused.append(
                f"the finished training {folder.name} of {len(history)} epochs cannot be extended: {reason}"
            )
        elif found is None or checkpoint.num_steps > found.num_steps:
            found = checkpoint
            extending = f"extending the finished training {folder.name} of {len(history)} epochs"
    if found is None:
        return None, [*told, *refused]
    return found, [*told, extending]


def _reason_against(history: list[dict[str, Any]], config: TrainConfig) -> str | None:
    if len(history) > config.epochs:
        return f"params.yaml asks for {config.epochs}"
    for record in history:
        asked = learning_rate_at(config, record["epoch"] - 1)
        if record["learning_rate"] != asked:
            return (
                f"its learning rate in epoch {record['epoch']} was {record['learning_rate']:g}, "
                f"params.yaml asks for {asked:g}"
            )
    return None

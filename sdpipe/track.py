"""Bring MLflow up to what the files of a run say."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from sdpipe.errors import DataError
from sdpipe.training.checkpoint import CheckpointFolder
from sdpipe.training.records import epoch_metrics, record_from_files
from sdpipe.training.run_record import RunRecord, read_note, remove_note
from sdpipe.training.tracking import awaited, publish, quietly


def track(folder: Path) -> str:
    """Publish models/<run>/ to MLflow; what is there already is left. Returns the MLflow run id.

    Raises TrackingError if the store refuses, ModelError or DataError if the files are not whole.
    """
    record = record_from_files(folder)
    with awaited():
        return publish(record)


def track_quietly(folder: Path) -> None:
    """The same, for a stage: a store that is down costs seconds and a warning; the files are the truth."""
    record = record_from_files(folder)
    quietly(lambda: publish(record))


def track_note(path: Path) -> tuple[RunRecord, str] | None:
    """Publish what a training noted that did not finish, or whose end MLflow did not hear.

    Returns what was sent and the MLflow run id, or None where its training sends it itself, or has.
    Raises TrackingError if the store refuses, DataError if the note is damaged, TrainingError if what the
    training saved cannot be read.
    """
    unfinished = path.with_name(path.name.partition(".")[0])
    lock = FileLock(unfinished.with_suffix(".lock"), timeout=0)
    try:
        with lock:  # and not while MLflow is talked to: a training that starts shall not wait for it
            if not path.exists():
                return None
            noted = read_note(path)
            record = noted
            if noted.status == "RUNNING":
                record = _as_killed(noted, path, CheckpointFolder(unfinished, noted.fingerprint))
        with awaited():
            run_id = publish(record)
        with suppress(Timeout), lock:
            if path.exists() and read_note(path) == noted:
                remove_note(path)
    except Timeout:
        return None
    except OSError as error:
        raise DataError(f"{path}: {error}") from error
    return record, run_id


def _as_killed(record: RunRecord, note: Path, checkpoints: CheckpointFolder) -> RunRecord:
    """A training whose process left no word: what it saved, and when.

    Another code may have saved it, with other metrics of an epoch, so they are sent as they stand there.
    """
    newest, _damaged = checkpoints.read_newest()
    ended_s = max(path.stat().st_mtime for path in (note, *checkpoints.paths()))
    return replace(
        record,
        status="KILLED",
        epochs=[] if newest is None else epoch_metrics(newest.state["history"], newest.state["timing"]),
        ended_ms=int(ended_s * 1000),
    )

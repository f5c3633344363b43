"""Bring MLflow up to what the files of a finished run say."""

from pathlib import Path

from sdpipe.training.records import record_from_files
from sdpipe.training.tracking import LiveTracker, publish


def track(folder: Path) -> str:
    """Publish models/<run>/ to MLflow; what is there already is left. Returns the MLflow run id.

    Raises TrackingError if the store refuses, ModelError or DataError if the files are not whole.
    """
    return publish(record_from_files(folder))


def track_quietly(folder: Path) -> None:
    """The same, for a stage: a store that is down costs seconds and a warning; the files are the truth."""
    LiveTracker(record := record_from_files(folder)).close(record.status)

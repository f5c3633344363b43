"""The MLflow store: where runs are kept, opened so that one that is down or odd is one line, and soon.

Two processes that create the same database at once crash each other, and MLflow cannot go on with half of its
tables; so a database in a file is made beside, under a lock.
"""

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from sdpipe.errors import SdpipeError, TrackingError, without_passwords
from sdpipe.files import project_root, replacing, work_folder

EXPERIMENT = "sdpipe"  # MLFLOW_EXPERIMENT_NAME overrides it

# MLflow's own variables; its defaults would block for minutes on a server that is down.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@contextmanager
def connected() -> Iterator[tuple[Any, str]]:
    """MLflow itself, with its store set and open, and the experiment's id.

    Raises TrackingError if the store refuses, within the block too.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow
    from google.protobuf.json_format import Error as JsonError  # type: ignore[import-untyped]
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors are raised, too
    try:
        yield mlflow, _open_store(mlflow)
    except SdpipeError:
        raise
    except Exception as error:
        # ImportError: a database's driver.
        is_expected = isinstance(error, MlflowException | SQLAlchemyError | OSError | ImportError | JsonError)
        is_answer = store_uri().startswith("http") and _arose_in_mlflow(error)
        if not (is_expected or is_answer):
            raise  # a bug, ours or MLflow's
        kind = "" if is_expected else f"an answer that makes no sense: {type(error).__name__}: "
        text = " ".join(f"{store_uri()}: {kind}{error}".split())
        raise TrackingError(f"MLflow: {without_passwords(text)[:300]}") from error


def _arose_in_mlflow(error: Exception) -> bool:
    """It trips over what a server that is none of MLflow's answers, in ways that no list of errors has."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith("mlflow.") for frame, _line in frames)


def store_uri() -> str:
    """Where runs are kept: MLFLOW_TRACKING_URI, else mlflow.db in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _address_of(project_root() / "mlflow.db")


def _address_of(database: Path) -> str:
    """Of an SQLite file. Only what SQLAlchemy takes apart is quoted, since MLflow does not unquote.

    It makes the folder that the address names, and so for a quoted letter one that nobody asked for.
    """
    return f"sqlite:///{str(database).replace('%', '%25').replace('?', '%3F')}"


def _open_store(mlflow: Any) -> str:
    """Set the store, create what is missing. Returns the experiment's id."""
    from mlflow.store.db.db_types import DATABASE_ENGINES

    uri = store_uri()
    try:
        urlsplit(uri)
    except ValueError as error:
        raise TrackingError(f"MLflow: {without_passwords(uri)} is no address: {error}") from error
    mlflow.set_tracking_uri(uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    with FileLock(work_folder() / "mlflow.lock"):
        if uri.startswith(tuple(DATABASE_ENGINES)):  # a server is not asked this way
            _create_database(mlflow, uri)
            _look_at(uri)
            _follow_artifacts(uri)
        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        # A server knows where its artifacts go; for our own database we say it.
        location = _artifacts().as_uri() if uri.startswith("sqlite:") else None
        return str(client.create_experiment(name, artifact_location=location))


def _file_of(uri: str) -> Path | None:
    """The database's file, if it is one of SQLite and named by its path."""
    from sqlalchemy import make_url

    url = make_url(uri)
    if url.get_backend_name() != "sqlite" or not url.database or "uri" in url.query:
        return None
    return Path(url.database)


def _create_database(mlflow: Any, uri: str) -> None:
    """Make a file's tables beside and rename: MLflow cannot go on with half of them."""
    path = _file_of(uri)
    if path is not None and not path.exists():
        with replacing(path) as beside:
            uri_beside = _address_of(beside)
            _look_at(uri_beside)
            mlflow.MlflowClient(uri_beside).search_experiments(max_results=1)


def _artifacts() -> Path:
    """Of a database in a file: the folder for models and figures."""
    return project_root() / "mlartifacts"


# Where MLflow notes whole addresses of artifacts (3.17).
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def _follow_artifacts(uri: str) -> None:
    """Note the artifacts' new addresses in the project's own database, if the project was moved or copied.

    Else its models could not be loaded, and new ones would be written to the old folder.
    """
    import sqlalchemy as sql

    path, here = _file_of(uri), _artifacts()
    if path is None or path.resolve().parent != project_root().resolve():
        return  # a server, or one of several projects
    engine = sql.create_engine(uri, poolclass=sql.NullPool)
    with engine.begin() as connection:
        known = sql.select(sql.column("artifact_location", sql.String)).select_from(sql.table("experiments"))
        for there in connection.execute(known).scalars().all():
            folder = Path(url2pathname(urlsplit(there).path)) if there.startswith("file:") else here
            stayed = folder.exists() and not here.exists()
            if stayed or folder == here or folder.name != here.name:
                continue
            for table, column in _ADDRESSES:
                at = sql.column(column, sql.String)
                is_below = sql.or_(at == there, sql.func.substr(at, 1, len(there) + 1) == f"{there}/")
                moved = sql.literal(here.as_uri()) + sql.func.substr(at, len(there) + 1)
                connection.execute(sql.table(table, at).update().where(is_below).values({column: moved}))


def _look_at(uri: str) -> None:
    """Connect to a database once. Where that fails, MLflow would try for 100 s."""
    import sqlalchemy

    sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()

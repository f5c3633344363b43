"""The MLflow store in a file of SQLite: its address, its making, and its artifacts in the folder beside it.

Two processes that create the same database at once crash each other, and MLflow cannot go on with half of its
tables; so it is made beside, under a lock.
"""

import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock

from sdpipe.errors import TrackingError
from sdpipe.files import project_root

BESIDE_TAG = "artifacts.beside"
"""Of the experiments whose artifacts lie beside the database, wherever both are moved."""

# Where MLflow notes whole addresses of artifacts (3.17).
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def address_of(database: Path) -> str:
    """Of an SQLite file. Only what SQLAlchemy takes apart is quoted, since MLflow does not unquote.

    It makes the folder that the address names, and so for a quoted letter one that nobody asked for.
    """
    return f"sqlite:///{str(database).replace('%', '%25').replace('?', '%3F')}"


def from_the_root(uri: str) -> str:
    """The address with a file's relative path taken from the project's root, wherever DVC runs the stage."""
    dialect, _, path = uri.partition(":///")
    if dialect.partition("+")[0] != "sqlite" or not path or path.startswith(("/", "?", ":memory:", "file:")):
        return uri
    return address_of(project_root()).replace("sqlite", dialect, 1) + f"/{path}"


def file_of(uri: str) -> Path | None:
    """The database's file, if it is one of SQLite and named by its path.

    Raises TrackingError if it is one in memory, of which each connection would have its own.
    """
    from sqlalchemy import make_url

    if not uri.startswith("sqlite") or "uri" in (url := make_url(uri)).query:
        return None
    if url.database in (None, "", ":memory:"):
        raise TrackingError(f"MLflow: {uri}: expected a file; what is in memory is lost")
    return Path(url.database)


def create_database(mlflow: Any, uri: str) -> None:
    """Make a file's tables beside and rename: MLflow cannot go on with half of them.

    A file of 0 bytes is as good as none: SQLite takes it for a database without a table.
    """
    path = file_of(uri)
    if path is None or _is_made(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")  # and not the project's, since several may share a database
    lock.touch()  # where it cannot be made, FileLock would try for ever
    with FileLock(lock):
        if _is_made(path):
            return
        beside = path.with_name(f".{path.name}.new")
        _remove(beside)  # of a process that was killed
        try:
            uri_beside = address_of(beside)
            look_at(uri_beside)
            mlflow.MlflowClient(uri_beside).search_experiments(max_results=1)
            if not _is_made(path):  # by a server of MLflow, which knows of no lock
                beside.replace(path)
        finally:
            _remove(beside)


def _is_made(path: Path) -> bool:
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def _remove(database: Path) -> None:
    """With SQLite's journal, which it would roll back into the next file of that name."""
    for path in database.parent.glob(f"{glob.escape(database.name)}*"):
        path.unlink()


def artifacts() -> Path:
    """Of a database in a file: the folder for models and figures."""
    return project_root() / "mlartifacts"


def is_own(uri: str) -> bool:
    """The database lies in the project, beside its artifacts; another may be of several projects."""
    path = file_of(uri)
    return path is not None and path.resolve().parent == project_root().resolve()


def follow_artifacts(uri: str) -> None:
    """Note the artifacts' new addresses in the project's own database, if the project was moved or copied.

    Else its models could not be loaded, and new ones would be written to the old folder. Experiments without
    the tag are left: another project that logs here has its artifacts where they are.
    """
    import sqlalchemy as sql

    if not is_own(uri):
        return
    here = artifacts()
    experiments = sql.table("experiments", sql.column("experiment_id"), sql.column("artifact_location"))
    tags = sql.table("experiment_tags", sql.column("experiment_id"), sql.column("key"))
    known = sql.select(experiments.c.artifact_location).join(
        tags, sql.and_(tags.c.experiment_id == experiments.c.experiment_id, tags.c.key == BESIDE_TAG)
    )
    with sql.create_engine(uri, poolclass=sql.NullPool).begin() as connection:
        for there in connection.execute(known.distinct()).scalars().all():
            folder = Path(url2pathname(urlsplit(there).path))
            stayed = folder.exists() and not here.exists()
            if stayed or folder == here:
                continue
            for table, column in _ADDRESSES:
                at = sql.column(column, sql.String)
                is_below = sql.or_(at == there, sql.func.substr(at, 1, len(there) + 1) == f"{there}/")
                moved = sql.literal(here.as_uri()) + sql.func.substr(at, len(there) + 1)
                connection.execute(sql.table(table, at).update().where(is_below).values({column: moved}))


def look_at(uri: str) -> None:
    """Connect to a database once. Where that fails, MLflow would try for 100 s."""
    import sqlalchemy

    sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()

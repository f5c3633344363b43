"""Whether a file can be written, which a command asks before it measures for minutes."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile


def check_can_be_written(path: Path) -> None:
    """Raise OSError, naming `path`, unless a file there can be made. What is made to see that is removed."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    missing = [each for each in path.parents if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.").close()
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        for each in missing:
            with suppress(OSError):  # of new/../out it is `new/..`
                each.rmdir()

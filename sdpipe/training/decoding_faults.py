"""What stands in the way of decoded pictures, in the words of a training that waits for them."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from sdpipe.errors import LoadingError

_SHORT = (errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EMFILE)
_DEATHS = ("DataLoader worker", "Pin memory thread exited")
"""How the DataLoader begins to tell of a process's death; the second, where its batch was being pinned."""
_TOO_MANY_FILES = "Too many open files. "
"""How it tells that it cannot take a batch for want of file descriptors."""
_OF_A_WORKER = "Caught "
"""How it begins to tell of an error within a worker, which is a bug."""
_NO_THREAD = "can't start new thread"  # Python's words


@contextmanager
def faults_on_one_line() -> Iterator[None]:
    """Turn what the DataLoader raises for want of processes, memory or files into a LoadingError."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if str(error).startswith(_TOO_MANY_FILES):
            raise LoadingError(
                "too many files are open for pictures to come from the processes that decode them; a higher "
                "`ulimit -n` lets them, fewer machine.workers need less"
            ) from error
        if str(error) == _NO_THREAD:
            raise _not_started(_NO_THREAD) from error
        if isinstance(error, RuntimeError) and not str(error).startswith(_DEATHS):
            raise
        raise LoadingError(
            f"a process that decodes pictures has died ({first_line(error)}); memory may have been "
            "short, also in /dev/shm; fewer machine.workers need less"
        ) from error
    except OSError as error:  # of fork(), or of the queues between the processes
        if str(error).startswith(_OF_A_WORKER):
            raise
        if error.errno in _SHORT:
            raise _not_started(error.strerror) from error
        raise LoadingError(
            f"no picture comes from the processes that decode them ({error}); their sockets stand in "
            f"{tempfile.gettempdir()}, from where they may have been removed"
        ) from error


def _not_started(reason: str | None) -> LoadingError:
    return LoadingError(
        f"no process can be started to decode pictures ({reason}); memory, /dev/shm, the "
        "number of processes or of open files is short; fewer machine.workers need less"
    )


def first_line(error: Exception) -> str:
    """Of what an error says, or what it is."""
    return (str(error).splitlines() or [type(error).__name__])[0]

"""A process that decodes pictures: what it heeds, and how it tells that it cannot send them."""

import os
import signal
import sys
import tempfile
from multiprocessing import resource_sharer
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any

from sdpipe.runtime.memory import give_memory_back

UNSENT = "no picture can be sent to the training"
_LONGEST_TMPDIR = 75
"""Bytes: a socket's path may have 107 (unix(7)), and `/pymp-xxxxxxxx/listener-xxxxxxxx` is 32 of them."""


class Unreadable(str):
    """Why a picture cannot be read, in place of its pixels; exceptions would come as tracebacks."""

    __slots__ = ()


def start_worker(_worker: int) -> None:
    """Ctrl-C and the terminal's end are the parent's, which finishes its step and ends the workers.

    The parent keeps its memory for tensors; a worker has pictures.
    """
    give_memory_back()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler came along
    sys.excepthook = _pass_over_lost_parent
    Queue._on_queue_feeder_error = _tell_instead  # type: ignore[attr-defined]
    Queue._start_thread = _start_thread_or_end  # type: ignore[attr-defined]


def _pass_over_lost_parent(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Called in the thread that shares memory: of a parent that was killed nobody needs to be told."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


_start_thread = Queue._start_thread  # type: ignore[attr-defined]


def _start_thread_or_end(results: "Queue[Any]") -> None:
    """Start the thread that sends. Without it nothing can be told; that a worker has died is noticed."""
    try:
        _start_thread(results)
    except RuntimeError:
        os._exit(1)


def _tell_instead(results: "Queue[Any]", error: Exception, unsent: tuple[int, object] | bytes) -> None:
    """Tell why a batch cannot be sent, in its place: it would be waited for for ever, behind a traceback.

    Called in the thread that sends it, which first makes a socket, through which memory is shared.
    """
    if not isinstance(unsent, tuple):
        os._exit(1)  # nothing can be told, either
    sharer = resource_sharer._resource_sharer  # type: ignore[attr-defined]
    if sharer._listener is not None and sharer._thread is None:
        # Its thread could not be started, and the next batch would go out with a socket that nobody serves.
        sharer._listener.close()
        sharer._listener = sharer._address = None
    reason = str(error)
    if reason == "AF_UNIX path too long":
        folder = tempfile.gettempdir()
        reason = (
            f"TMPDIR, {folder}, is of {len(os.fsencode(folder))} bytes, and the sockets that stand there let "
            f"it have {_LONGEST_TMPDIR}"
        )
    results.put((unsent[0], Unreadable(f"{UNSENT}: {reason}")))

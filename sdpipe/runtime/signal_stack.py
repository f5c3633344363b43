"""Keeping the stack that this thread's signal handlers run on, which OpenVINO replaces.

It sets one of its own now and then (2026.4.1: 11,568 bytes), frees it with the compiled model, and leaves it
set: the next Ctrl-C or SIGCHLD would then end the process with a segmentation fault.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    # stack_t, https://man7.org/linux/man-pages/man2/sigaltstack.2.html
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Put this thread's alternate signal stack back as it was, or to none."""
    before = _Stack()
    _sigaltstack(None, before)
    try:
        yield
    finally:
        _sigaltstack(before, None)


def _sigaltstack(new: _Stack | None, old: _Stack | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sigaltstack(new and ctypes.byref(new), old and ctypes.byref(old)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

"""What glibc does with memory that is given up; other C libraries are left as they are."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h, in bytes
_NEVER_TRIM = -1
_LARGEST = 2**31 - 1


def give_memory_back() -> None:
    """Return what a large picture took as soon as it is gone, where several threads or processes decode.

    Each would keep up to hundreds of megabytes. Not for a training, whose tensors come and go.
    """
    _set_option(_M_MMAP_THRESHOLD, 2**20)  # else it rises by itself


def keep_memory() -> None:
    """Keep what a training's tensors took for those of the next step.

    Returned and asked for again, each of their pages is a fault: none or 80,000 in a step of 110 layers (a
    fifth of its time), by chance of what lies beside them.
    """
    _set_option(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    _set_option(_M_MMAP_THRESHOLD, _LARGEST)


def _set_option(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)

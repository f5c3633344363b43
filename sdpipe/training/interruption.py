"""What asks a training to end, as a question that its loop asks between steps, with an end to patience."""

import _thread
import ctypes
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

from sdpipe.errors import TrainingError, tell

ENDING_S = 10.0  # in which a training that was asked to end has ended
GRACE_S = 7.0  # of these, for the step, its validation, its checkpoint, and a store that is slow to answer
_STORE_S = 2.0  # for the store at least, and for who presses Ctrl-C twice
_LAST_WORD_S = 0.5
_PR_SET_PDEATHSIG = 1  # prctl(2)
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_Order = tuple[float, Callable[[], NoReturn]]
"""When the process ends, on the monotonic clock, and how."""


class Interruption:
    """Whether the process was asked to end. Use `noticing_signals()`."""

    def __init__(self, on_give_up: Callable[[], None]) -> None:
        self._on_give_up = on_give_up
        self.number: int | None = None
        self._noticed = 0.0
        self._is_hurried = False
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()  # a signal handler may put

    @property
    def requested(self) -> bool:
        """True once one of the signals came."""
        return self.number is not None

    def remaining_s(self) -> float:
        """Seconds to wait for MLflow in."""
        passed = time.monotonic() - self._noticed if self.requested else 0.0
        return _STORE_S if self._is_hurried else max(_STORE_S, GRACE_S - passed)

    def end(self) -> None:
        """Raise what the signal stands for: KeyboardInterrupt, or SystemExit of 128 + its number.

        Where another process of the training has it, as of SIGTERM.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.number or signal.SIGTERM))

    def notice(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler. A second Ctrl-C ends the process at once.

        A second SIGTERM does not: a scheduler sends one to each process, and torchrun sends it on.
        """
        if self.number is not None:
            if number == signal.SIGINT:
                self._is_hurried = True
                self.end()
            return
        self.number = number
        self._noticed = time.monotonic()
        self._orders.put((self._noticed + GRACE_S, self._give_up))
        # Not from here: the signal may have come in the middle of a line that the main thread writes.
        _start(partial(tell, "stopping after this step; Ctrl-C to stop at once"))

    def watch(self) -> None:
        """What the watchdog does, a thread: end the process as it was last ordered to.

        It is there before a signal is. Where memory is short none may begin, and Thread.start() would wait
        for it for ever.
        """
        order = self._orders.get()
        while order is not None:
            ends_at, end = order
            try:
                order = self._orders.get(timeout=max(0.0, ends_at - time.monotonic()))
            except queue.Empty:
                end()

    def forget(self) -> None:
        """End the watchdog: the block has ended."""
        self._orders.put(None)

    def allow_last_words(self) -> None:
        """The step has ended. A reader or a disk that keeps the rest waiting ends with the promised time."""
        if self.number is not None:
            self._orders.put((self._noticed + ENDING_S - _LAST_WORD_S, partial(_end_now, 128 + self.number)))

    def _give_up(self) -> NoReturn:
        assert self.number is not None
        try:
            self._on_give_up()
            tell_in_time(
                f"error: what was under way did not end in {GRACE_S:.0f} s; "
                "a checkpoint, if there is one, is good"
            )
        finally:  # whatever the lack of memory leaves undone
            _end_now(128 + self.number)


def say(text: str) -> None:
    """Print a line, if anybody still reads: a training goes on without, and closes its run behind it."""
    with suppress(OSError):
        print(text, flush=True)


def tell_in_time(text: str) -> None:
    """Print a line to standard error, and wait half a second at most for who reads it."""
    _start(partial(tell, text)).wait(_LAST_WORD_S)


def _start(work: Callable[[], object]) -> threading.Event:
    """Standard error may be a terminal that nobody reads, which blocks who writes to it; a disk may hang.

    Returns what is set when nothing more comes of it. Where memory is too short for a thread, it is not done;
    a Thread.start() may then wait for ever.
    """
    is_over = threading.Event()

    def do_it() -> None:
        work()
        is_over.set()

    try:
        _thread.start_new_thread(do_it, ())
    except RuntimeError:
        is_over.set()
    return is_over


def ending_signals() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C's, and that of a terminal that closes, unless `nohup` has it ignored."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in _ENDING if number != signal.SIGHUP or not is_nohup]


@contextmanager
def noticing_signals(on_give_up: Callable[[], None]) -> Iterator[Interruption]:
    """Turn what `ending_signals` names into `Interruption.requested` while the block runs (main thread only).

    on_give_up: called, in another thread, when the block has not ended GRACE_S after the signal; the process
    ends behind it.
    """
    interruption = Interruption(on_give_up)
    threading.Thread(target=interruption.watch, daemon=True).start()  # a signal still ends its wait
    before = {number: signal.signal(number, interruption.notice) for number in ending_signals()}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        interruption.forget()


def end_with_parent() -> None:
    """Get SIGTERM when the parent ends, on Linux: what it started must not hold the run against a new start.

    It stays so for the program that this process becomes (execve(2)).
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        raise TrainingError("what started this training has ended")


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Where the block ends with the exit status of an interruption, end the process here.

    All is saved and said by then, and to take down PyTorch and MLflow in good order costs seconds of the 10
    that are promised.
    """
    try:
        yield
    except SystemExit as ended:
        if ended.code not in [128 + number for number in _ENDING]:
            raise
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                if stream is not None:
                    stream.flush()
        _end_now(int(ended.code))


def _end_now(status: int) -> NoReturn:
    """With the processes that decode pictures, which would hold this one's output for seconds.

    The folder where their sockets stand goes with them, unless its disk hangs.
    """
    try:
        for child in multiprocessing.active_children():
            child.kill()
        folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
        if folder is not None:
            _start(partial(shutil.rmtree, folder, ignore_errors=True)).wait(_LAST_WORD_S)
    finally:
        os._exit(status)

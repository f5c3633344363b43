"""The DVC stages: thin scripts that read params.yaml, call one library function and write outputs."""

import gc
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType

from sdpipe.errors import ConfigError, errors_on_one_line

# What importing PyTorch makes stays to the end. To look through it for garbage while it is made, and again at
# the end, would take a quarter of a stage's start.
if sys.argv[0] == "-m":  # a stage is being started, which ends in `run_stage`
    gc.disable()


def run_stage(main: Callable[..., None]) -> None:
    """Call a stage's main with the words of the command line; what is no bug ends in one line."""
    gc.freeze()
    gc.enable()
    words = sys.argv[1:]
    with errors_on_one_line():
        try:
            inspect.signature(main).bind(*words)
        except TypeError as error:
            raise ConfigError(f"called with {words}: {error}") from error
        main(*words)


def _tell_of_ctrl_c(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Ctrl-C in the seconds in which a stage still imports its packages is no bug to show a traceback of."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


sys.excepthook = _tell_of_ctrl_c

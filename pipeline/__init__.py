"""The DVC stages: thin scripts that read params.yaml, call one library function and write outputs."""

import os
import signal
import sys
from types import TracebackType


def _tell_of_ctrl_c(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Ctrl-C in the seconds in which a stage still imports its packages is no bug to show a traceback of."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


sys.excepthook = _tell_of_ctrl_c

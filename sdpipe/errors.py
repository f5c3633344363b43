"""Every error that is not our bug. The library raises the leaves; the command line prints one line.

SdpipeError
├── ConfigError        params.yaml: a wrong key, type or range
├── DataError          a data set: source, digest, archive, format, class folder
│   └── ImageError     one picture that cannot be read
├── ModelError         a model file: missing, damaged, foreign, of another schema
├── DeviceError        a device or precision that this machine does not have
├── BusyError          another process holds what this one needs
├── TrainingError      a training that cannot go on: a loss that is not finite, memory, a dead process
│   └── LoadingError   its next images cannot be had; its state is whole
├── ParityError        ONNX and PyTorch differ
├── GateError          a run that may not be deployed
└── TrackingError      the MLflow store cannot be reached
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

_OF_THE_WORLD = (  # also where no file is named, as in writing to standard output
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EPIPE,  # who read our output has gone
)


def on_one_line(text: str) -> str:
    """File names may hold newlines and terminal codes; a line of output must stay one line."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def without_passwords(text: str) -> str:
    """URLs in it with *** for user and password, and for a parameter `password`."""
    # Behind a colon a password may hold slashes; without one an @ in the path ends no user.
    text = re.sub(r"(?<=://)[^/\s:]*(:\S*)?@", "***@", text)
    return re.sub(r"(?<=[?&]password=)[^&\s]*", "***", text)


class SdpipeError(Exception):
    """The user's mistake or the outside world's; its text is one plain line, whatever it names."""

    def __str__(self) -> str:
        return on_one_line(super().__str__())


class ConfigError(SdpipeError):
    """params.yaml does not hold what sdpipe expects; the text names the key."""


class DataError(SdpipeError):
    """A data set cannot be fetched, read or split; the text names the file."""


class ImageError(DataError):
    """One picture cannot be read.

    `code` is a word for programs (`not_found`, `not_an_image`, ...); the text is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ModelError(SdpipeError):
    """A model file is missing, damaged, foreign or of another schema."""


class DeviceError(SdpipeError):
    """A device or a precision was asked for that this machine does not have."""


class BusyError(SdpipeError):
    """Another process holds what this one needs."""


class TrainingError(SdpipeError):
    """A training cannot go on."""


class LoadingError(TrainingError):
    """The next images cannot be had: a picture is damaged, or the process that decodes it has died."""


class ParityError(SdpipeError):
    """The deployed file does not compute what the PyTorch reference computes."""


class GateError(SdpipeError):
    """A run did not pass what deployment asks of it."""


class TrackingError(SdpipeError):
    """The MLflow store cannot be reached or refuses."""


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """Turn an `SdpipeError`, what the system says of a file, or an interruption into one line and an exit.

    Exit status 1 for errors, 130 for Ctrl-C, 143 for SIGTERM, which unwinds in good order like Ctrl-C. With
    SDPIPE_DEBUG=1 the traceback comes through. Every other exception is our bug and does too.
    """
    before = signal.signal(signal.SIGTERM, _exit_in_order)
    try:
        yield
    except (SdpipeError, OSError) as error:
        if os.environ.get("SDPIPE_DEBUG") == "1" or not is_of_the_world(error):
            raise
        tell(f"error: {on_one_line(str(error))}")
        raise SystemExit(1) from None
    except (KeyboardInterrupt, ImportError) as error:
        # A module in C turns what ends its start into an ImportError.
        interruption = interruption_behind(error)
        if interruption is None:
            raise
        if isinstance(interruption, SystemExit):
            raise interruption from None
        tell("interrupted")
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def interruption_behind(error: BaseException | None) -> KeyboardInterrupt | SystemExit | None:
    """What ended an import, among the causes of the error that it ended with."""
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__cause__ or error.__context__
    return error


def tell(text: str) -> None:
    """Print a line to standard error, if anybody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def is_of_the_world(error: SdpipeError | OSError) -> bool:
    """Of OSErrors a full disk and its like, and those that name a file, unless it is one of sdpipe's own."""
    if isinstance(error, SdpipeError) or error.errno in _OF_THE_WORLD:
        return True
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return False
    return not Path(os.fsdecode(error.filename)).is_relative_to(Path(__file__).parent)


def _exit_in_order(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


@contextmanager
def training_packages(command: str) -> Iterator[None]:
    """Tell users of the base install which packages a command needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SdpipeError(
            f"{command} needs the training packages: pip install 'sdpipe[train]' ({error})"
        ) from error

"""Where pictures come from: files, folders, globs, standard input and, if allowed, the web."""

import fnmatch
import glob
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdpipe.errors import ImageError
from sdpipe.runtime.folders import is_folder, walk
from sdpipe.runtime.image import MAX_BYTES, check_size, image_suffixes

STDIN = "-"

TIMEOUT_S = 10.0
"""For a URL, from the first look-up to the last byte."""

_CHUNK_BYTES = 2**16
_LOOK_S = 0.1
_PACKINGS = ("gzip", "x-gzip", "deflate", "br", "zstd", "compress")  # others, as aws-chunked, leave the bytes


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A picture that could not be predicted, and why."""

    file: str
    code: str
    message: str


def expand(
    arguments: Iterable[str],
    *,
    allow_url: bool = False,
    but: Path | None = None,
    passed_over: Callable[[str], None] = lambda _name: None,
) -> Iterator[str | Failure]:
    """Names for arguments that are files, folders (searched through, sorted), globs, URLs or `-`.

    but: a file that is in no folder and matches no glob, as the one that is about to be written.
    passed_over: called with each file that is left out of a folder, since its name is no picture's.
    """
    left_out = None if but is None else os.path.realpath(but)
    for argument in arguments:
        if argument == STDIN:
            yield argument
        elif is_url(argument):
            yield argument if allow_url else _url_not_allowed(argument)
        elif not _exists(argument) and glob.has_magic(argument):
            yield from _once(_of_glob(argument, left_out, passed_over))
        elif not argument:
            yield Failure(file=argument, code="not_found", message="an empty file name")
        else:
            # What is neither folder nor file is the decoder's to explain.
            yield from _in_folder(argument, left_out, passed_over) if is_folder(argument) else [argument]


def _of_glob(
    pattern: str, left_out: str | None, passed_over: Callable[[str], None]
) -> Iterator[str | Failure]:
    matches = [match for match in _matches(pattern) if not _is_file(match, left_out)]
    direct = set(matches)
    first: dict[str, str] = {}  # of the matches, the one below which a folder was found first

    def tell(match: str, name: str) -> None:
        """Of a file once, and not if it is a match itself: `**/*` matches it, and every folder above it."""
        if name not in direct and first.setdefault(os.path.dirname(name), match) == match:  # noqa: PTH120
            passed_over(name)

    for match in matches:
        name = f"./{match}" if match == STDIN else match
        yield from _in_folder(match, left_out, partial(tell, match)) if is_folder(match) else [name]
    if not matches:
        yield Failure(file=pattern, code="not_found", message="no file matches")


def _once(names: Iterator[str | Failure]) -> Iterator[str | Failure]:
    """Each once: `**/*` matches a picture, and every folder above it."""
    seen = set()
    for name in names:
        if name not in seen:
            seen.add(name)
            yield name


def is_url(name: str) -> bool:
    """Whether a name is a URL of any scheme."""
    return "://" in name and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def _url_not_allowed(url: str) -> Failure:
    message = "is a URL, and nothing is fetched without --allow-url"
    return Failure(file=url, code="url_not_allowed", message=message)


def _exists(name: str) -> bool:
    try:
        return bool(name) and os.path.lexists(name)
    except ValueError:  # a NUL byte in the name
        return False


def _matches(pattern: str) -> list[str]:
    """What a glob matches, sorted. `**` is any folder below, but no link, which may lead round in a circle.

    Not glob.glob, which follows links, and gives up 1,000 folders deep. Names come without a `./`, as those
    in a folder do.
    """
    paths = ["/" if pattern.startswith("/") else ""]
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    for at, part in enumerate(parts):
        found: Iterable[str]
        if part == "**" and at == len(parts) - 1:  # a folder is searched through anyway
            found = (path or "." for path in paths if is_folder(path or "."))
        elif part == "**":
            found = (folder for path in paths for folder, _ in walk(path, lambda _error: None))
        elif glob.has_magic(part):
            found = (os.path.join(path, name) for path in paths for name in _names(path, part))  # noqa: PTH118
        else:
            found = (name for path in paths if _exists(name := os.path.join(path, part)))  # noqa: PTH118
        paths = list(dict.fromkeys(found))
    return sorted(path for path in paths if is_folder(path) or not pattern.endswith(("/", "/.")))


def _names(folder: str, pattern: str) -> list[str]:
    try:
        names = os.listdir(folder or ".")  # noqa: PTH208  of names, not paths
    except OSError:
        return []
    return [name for name in fnmatch.filter(names, pattern) if name[0] != "." or pattern[0] == "."]


def _is_file(name: str, path: str | None) -> bool:
    """Whether a name leads to the file of this real path; only names that end alike are looked up."""
    return path is not None and name.endswith(os.path.basename(path)) and os.path.realpath(name) == path  # noqa: PTH119


def ending_of(name: str) -> str:
    """Such as ".heic" of IMG_1.HEIC; nothing where there is none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def _in_folder(
    folder: str, left_out: str | None, passed_over: Callable[[str], None]
) -> Iterator[str | Failure]:
    """Pictures of a folder and those below it, sorted; hidden ones and one path are left out."""
    endings = image_suffixes()
    unreadable: list[OSError] = []
    found = 0
    for parent, names in walk(folder, unreadable.append):
        start = os.path.join(Path(parent), "").removeprefix("./")  # noqa: PTH118
        for name in names:  # thousands, and a Path takes a tenth of what a small picture does
            if ending_of(name) not in endings:
                passed_over(start + name)
            elif not _is_file(start + name, left_out):
                found += 1
                yield start + name
    for error in unreadable:
        code = "no_permission" if isinstance(error, PermissionError) else "unreadable"
        yield Failure(file=str(error.filename), code=code, message=f"cannot be listed: {error.strerror}")
    if not found and not unreadable:
        yield Failure(file=folder, code="no_pictures", message="the folder holds no pictures")


def read_source(name: str, is_given_up: Callable[[], bool] = lambda: False) -> Path | bytes:
    """What the decoder reads: a path, or the bytes of standard input or a URL.

    is_given_up: asked while a URL is waited for. Raises ImageError.
    """
    if name == STDIN:
        return _read_stdin()
    return read_url(name, is_given_up) if is_url(name) else Path(name)


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise ImageError("unreadable", "standard input is closed")
    try:
        raw = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageError("unreadable", f"standard input cannot be read: {error}") from error
    if raw is None:  # it does not block
        raise ImageError("unreadable", "standard input has nothing to read yet")
    check_size(len(raw))
    return raw


def read_url(url: str, is_given_up: Callable[[], bool] = lambda: False) -> bytes:
    """Fetch over http or https, redirects among these included, within TIMEOUT_S in all.

    is_given_up: asked while it is waited for; then what was fetched is left. Raises ImageError for other
    schemes, a user or password in the URL, what is too large, too slow or not there.
    """
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ImageError("not_fetched", "only http:// and https:// are fetched")
    if re.match(r"https?://[^/?#]*@", url, re.IGNORECASE):
        raise ImageError("not_fetched", "user and password in a URL are not sent; fetch the file beforehand")
    answers: list[bytes | ImageError] = []
    # A socket's own timeout starts again with every byte, and looking up a name has none.
    fetching = threading.Thread(target=lambda: answers.append(_fetch(url)), daemon=True)
    fetching.start()
    deadline = time.monotonic() + TIMEOUT_S
    while fetching.is_alive() and time.monotonic() < deadline and not is_given_up():
        fetching.join(_LOOK_S)
    answer = answers[0] if answers else _too_slow()
    if isinstance(answer, ImageError):
        raise answer
    return answer


def _too_slow() -> ImageError:
    return ImageError("not_fetched", f"no whole answer in {TIMEOUT_S:g} s")


def _cut_off() -> ImageError:
    return _not_fetched("the connection ended before the whole file")


def _not_fetched(reason: str) -> ImageError:
    return ImageError("not_fetched", f"cannot be fetched: {' '.join(reason.split())[:200]}")


def _fetch(url: str) -> bytes | ImageError:
    # These take longer to import than a picture to predict.
    from http.client import HTTPException, IncompleteRead
    from urllib import request
    from urllib.error import HTTPError, URLError
    from urllib.parse import urlsplit

    class PortCheck(request.BaseHandler):
        """Of redirects, too: the system takes the rest of a port's division by 65,536."""

        def http_request(self, asked: request.Request) -> request.Request:
            _ = urlsplit(asked.full_url).port  # ValueError
            return asked

        https_request = http_request

    opener = request.OpenerDirector()  # not build_opener, which also reads ftp:, file: and data:
    for handler in (
        request.ProxyHandler, request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler, request.HTTPErrorProcessor, request.UnknownHandler,
        PortCheck,
    ):  # fmt: skip
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", "sdpipe")]
    deadline = time.monotonic() + TIMEOUT_S
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            codings = ",".join(answer.headers.get_all("Content-Encoding", [])).lower().split(",")
            if packings := [each.strip() for each in codings if each.strip() in _PACKINGS]:
                return _not_fetched(f"the server packs it as {packings[0]}, which was not asked for")
            announced = answer.length or 0  # None of an answer in chunks, which says itself where it ends
            check_size(announced)
            parts, num_bytes = [], 0
            while part := answer.read1(_CHUNK_BYTES):
                if time.monotonic() > deadline:
                    return _too_slow()
                parts.append(part)
                check_size(num_bytes := num_bytes + len(part))
            return b"".join(parts) if num_bytes >= announced else _cut_off()
    except ImageError as error:
        return error
    except HTTPError as error:
        error.close()
        return _not_fetched(str(error))  # "HTTP Error 404: Not Found"
    except (OSError, HTTPException, ValueError, OverflowError) as error:  # the last two: no URL to be asked
        reason = error.reason if isinstance(error, URLError) else error  # which it only wraps
        if isinstance(reason, TimeoutError):
            return _too_slow()
        if isinstance(reason, IncompleteRead):
            return _cut_off()
        if isinstance(reason, UnicodeError):
            return _not_fetched("letters outside ASCII; a URL has them in the form %C3%A4")
        return _not_fetched(str(reason))

"""Getting a file from where it is (a URL, a file, a folder) to a verified local path.

A download is resumed where it stopped, and gets its final name only after its check.
"""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from tqdm import tqdm
from urllib3.exceptions import HTTPError

from sdpipe.errors import DataError, without_passwords
from sdpipe.files import local_path, sha256_of

CHUNK_BYTES = 1 << 14  # what is lost when a connection breaks within a chunk
TIMEOUT_S = (10, 60)  # to connect, and between two chunks
ATTEMPTS = 4
_PASSING = (429, 500, 502, 503, 504)  # of a server that is busy, or beginning anew
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")  # Content-Range, RFC 9110 14.4
FILE_ENDINGS = (".gz", ".tgz", ".tar", ".bz2", ".xz", ".zip", ".mat")


class _BrokenOffError(Exception):
    """The connection ended before the whole file had come; what came is kept."""


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return urlsplit(source).scheme in ("http", "https")


def as_shown(source: str) -> str:
    """A source for messages and meta.json; of a URL what may be secret is left out: user, password, query."""
    if not is_url(source):
        return source
    return urlsplit(without_passwords(source))._replace(query="", fragment="").geturl()


Check = Callable[[Path, str], None]
"""Raises DataError, with the name given for messages, unless a file is the one that is expected."""


def has_sha256(expected: str) -> Check:
    """A check of a file's SHA-256."""

    def check(path: Path, name: str) -> None:
        if (found := sha256_of(path)) != expected:
            raise DataError(f"{name}: SHA-256 expected {expected}, found {found}")

    return check


def locate(source: str, name: str, downloads: Path, check: Check | None) -> Path:
    """The local path of file `name` of a source, downloaded first where the source is a URL.

    source: a folder or a URL that holds `name`, or the file itself (a URL with an archive's ending).
    downloads: folder for downloads; one that passes the check is used again.
    check: None trusts the file, and downloads it each time.
    Raises DataError naming the file: not there, a failed check, a server's refusal.
    """
    if is_url(source):
        url = source if not name or _is_file(source) else _inside(source, name)
        return _download(url, downloads / (name or _name_of(url)), check)
    path = local_path(source)
    if path.is_dir() and name:
        path = path / name
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if check is not None:
        check(path, str(path))
    return path


def _is_file(url: str) -> bool:
    return urlsplit(url).path.lower().endswith(FILE_ENDINGS)


def _inside(url: str, name: str) -> str:
    parts = urlsplit(url)  # a query, such as a mirror's token, stands behind the path
    return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()


def _name_of(url: str) -> str:
    name = Path(unquote(urlsplit(url).path)).name
    return name if name not in ("", "..") and "\0" not in name else "download"


def _download(url: str, path: Path, check: Check | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):  # two fetches of one file take turns
        if not _is_right(path, check):
            _fetch_and_check(url, path, check)
    return path


def _is_right(path: Path, check: Check | None) -> bool:
    if check is None or not path.exists():
        return False
    try:
        check(path, str(path))
    except DataError:
        return False
    return True


@dataclass
class _Part:
    """What has come of a file."""

    path: Path
    version: str | None = None
    """ETag or Last-Modified of the server's file, where this process asked for it."""
    total: int | None = None
    """Bytes of the whole file, where the server said it."""

    @property
    def size(self) -> int:
        """Bytes, 0 where nothing has come."""
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        """Start over."""
        self.path.unlink(missing_ok=True)
        self.version = self.total = None


def _fetch_and_check(url: str, path: Path, check: Check | None) -> None:
    # The part's name carries its address, so that another URL never continues it.
    tag = hashlib.sha256(url.encode()).hexdigest()[:12]
    part = _Part(path.with_name(f"{path.name}.{tag}.part"))
    shown, is_whole = as_shown(url), False
    try:
        for attempt in Retrying(
            retry=retry_if_exception_type((_BrokenOffError, requests.ConnectionError, requests.Timeout)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=0.5, max=8),
            reraise=True,
        ):
            with attempt:
                if check is None and part.version is None:
                    part.discard()  # nothing would notice a file that changed on the server meanwhile
                while not _transfer(url, part):
                    pass
        is_whole = True
    except _BrokenOffError as error:
        again = "" if check is None else "; run again to continue"
        raise DataError(f"{shown}: {error}{again}") from error
    except requests.RequestException as error:
        raise DataError(f"{shown}: {_reason(error)}") from error
    except OSError as error:
        raise DataError(f"{part.path}: {error.strerror}") from error
    finally:
        if check is None and not is_whole:
            with suppress(OSError):  # of a part that cannot be touched the first error tells
                part.discard()  # it will not be continued
    if check is not None:
        try:
            check(part.path, shown)
        except DataError:
            part.discard()
            raise
    part.path.replace(path)


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.TooManyRedirects):
        return "it leads from address to address without an end"
    if error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached"
    return _in_words(error)


def _in_words(error: Exception) -> str:
    """What a library says, which may name the address."""
    return re.sub(r"(?<=\?)\S+", "***", without_passwords(str(error)))


def _transfer(url: str, part: _Part) -> bool:
    """Fetch what is missing of a part; a server that knows no ranges sends everything again.

    Returns whether it is whole: a server may answer with less than was asked for.
    """
    have = part.size
    # Without identity a server may compress the stream, and its length and offsets would not be the file's.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if part.version is not None:
            headers["If-Range"] = part.version  # all of it, if it has changed
    with _get(url, headers) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            if have and response.headers.get("Content-Range") == f"bytes */{have}":
                return True  # all of it had come already
            part.discard()
            raise _BrokenOffError("the file changed on the server")
        if response.status_code in _PASSING:
            raise _BrokenOffError(f"the server answered {response.status_code} {response.reason}")
        response.raise_for_status()
        total = _number(response.headers.get("Content-Length"))
        is_range = response.status_code == requests.codes.partial_content
        if is_range:
            found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != have:
                part.discard()
                raise _BrokenOffError("the server continued at another place")
            total = _number(found[3]) or part.total  # what comes now may be less than what is missing
        else:
            have = 0
        part.total = total
        # A range need not repeat what names the version.
        part.version = _version(response) or (part.version if is_range else None)
        _save(response, part.path, have, total)
    if total is None or part.size >= total:
        return True
    if is_range and part.size > have:
        return False
    raise _BrokenOffError(f"the connection ended at {part.size} of {total} bytes")


def _get(url: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    except requests.RequestException:
        raise
    except (HTTPError, ValueError) as error:  # of an address that is none, the server's redirection too
        raise DataError(f"{as_shown(url)}: leads to no address: {_in_words(error)}") from error


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _version(response: requests.Response) -> str | None:
    """What names this version of the server's file for If-Range, where a weak ETag does not do (RFC 9110)."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _save(response: requests.Response, path: Path, have: int, total: int | None) -> None:
    with (
        path.open("ab" if have else "wb") as stream,
        tqdm(
            desc=_name_of(response.url), initial=have, total=total, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        try:
            # The bytes as they come: servers that call a .gz encoded in gzip send the file itself.
            for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
                stream.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
        except HTTPError as error:
            raise _BrokenOffError(f"the connection broke at {have} of {total or '?'} bytes") from error

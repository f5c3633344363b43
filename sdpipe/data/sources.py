"""Getting a file from where it is (a URL, a file, a folder) to a verified local path.

A download is resumed where it stopped, and gets its final name only after its check.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from tqdm import tqdm

from sdpipe.errors import DataError
from sdpipe.files import local_path, sha256_of

CHUNK_BYTES = 1 << 14  # what is lost when a connection breaks within a chunk
TIMEOUT_S = (10, 60)  # to connect, and between two chunks
ATTEMPTS = 4
FILE_ENDINGS = (".gz", ".tgz", ".tar", ".bz2", ".xz", ".zip", ".mat")


class _BrokenOffError(Exception):
    """The connection ended before the whole file had come; what came is kept."""


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return urlsplit(source).scheme in ("http", "https")


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
        url = source if not name or _is_file(source) else f"{source.rstrip('/')}/{name}"
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
    return urlsplit(url).path.endswith(FILE_ENDINGS)


def _name_of(url: str) -> str:
    return Path(unquote(urlsplit(url).path)).name or "download"


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


def _fetch_and_check(url: str, path: Path, check: Check | None) -> None:
    # The part's name carries its address, so that another URL never continues it.
    tag = hashlib.sha256(url.encode()).hexdigest()[:12]
    part = path.with_name(f"{path.name}.{tag}.part")
    if check is None:
        part.unlink(missing_ok=True)  # nothing would notice a file that changed on the server meanwhile
    try:
        for attempt in Retrying(
            retry=retry_if_exception_type((_BrokenOffError, requests.ConnectionError, requests.Timeout)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=0.5, max=8),
            reraise=True,
        ):
            with attempt:
                _transfer(url, part)
    except _BrokenOffError as error:
        raise DataError(f"{url}: {error}; run again to continue") from error
    except requests.RequestException as error:
        raise DataError(f"{url}: {_reason(error)}") from error
    except OSError as error:
        raise DataError(f"{part}: {error.strerror}") from error
    if check is not None:
        try:
            check(part, url)
        except DataError:
            part.unlink()
            raise
    part.replace(path)


def _reason(error: requests.RequestException) -> str:
    if error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.ConnectionError):
        return "the server cannot be reached"
    return str(error)


def _transfer(url: str, part: Path) -> None:
    """Fetch what is missing of `part`; a server that knows no ranges sends everything again."""
    have = part.stat().st_size if part.exists() else 0
    # Without identity a server may compress the stream, and its length and offsets would not be the file's.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # all of it had come already
            part.unlink()
            raise _BrokenOffError("the file changed on the server")
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise _BrokenOffError("the server continued at another place")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        _save(response, part, have, total)


def _save(response: requests.Response, part: Path, have: int, total: int | None) -> None:
    with (
        part.open("ab" if have else "wb") as stream,
        tqdm(
            desc=_name_of(response.url), initial=have, total=total, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        try:
            for chunk in response.iter_content(CHUNK_BYTES):
                stream.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
        except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError) as error:
            raise _BrokenOffError(f"the connection broke at {have} of {total or '?'} bytes") from error
    if total is not None and have < total:
        raise _BrokenOffError(f"the connection ended at {have} of {total} bytes")

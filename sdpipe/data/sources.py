"""Getting a file from where it is (a URL, a file, a folder) to a verified local path.

A download is resumed where it stopped, and nothing gets its final name before its SHA-256 was right.
"""

import hashlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from tqdm import tqdm

from sdpipe.errors import DataError
from sdpipe.files import project_root, sha256_of

CHUNK_BYTES = 1 << 14  # what is lost when a connection breaks within a chunk
TIMEOUT_S = (10, 60)  # to connect, and between two chunks
ATTEMPTS = 4
FILE_ENDINGS = (".gz", ".tgz", ".tar", ".bz2", ".xz", ".zip", ".mat")


class _InterruptedError(Exception):
    """The connection ended before the whole file had come; what came is kept."""


def is_url(source: str) -> bool:
    """Whether a source is to be downloaded."""
    return urlsplit(source).scheme in ("http", "https")


def local_path(source: str) -> Path:
    """A source on disk; a relative path starts at the project's root, wherever DVC runs the stage."""
    return project_root() / Path(source).expanduser()


def locate(source: str, name: str, downloads: Path, sha256: str | None) -> Path:
    """The local path of file `name` of a source, downloaded first where the source is a URL.

    source: a folder or a URL that holds `name`, or the file itself (a URL with an archive's ending).
    downloads: folder for downloads; a complete one is used again.
    sha256: digest of the file; None leaves the check to the caller.
    Raises DataError naming the file: not there, a wrong digest, a server's refusal.
    """
    if is_url(source):
        url = source if not name or _is_file(source) else f"{source.rstrip('/')}/{name}"
        return _download(url, downloads / (name or _name_of(url)), sha256)
    path = local_path(source)
    if path.is_dir() and name:
        path = path / name
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if sha256 is not None:
        _check_digest(path, sha256, path)
    return path


def _is_file(url: str) -> bool:
    return urlsplit(url).path.endswith(FILE_ENDINGS)


def _name_of(url: str) -> str:
    return Path(unquote(urlsplit(url).path)).name or "download"


def _check_digest(path: Path, expected: str, named: object) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DataError(f"{named}: SHA-256 expected {expected}, found {found}")


def _download(url: str, path: Path, sha256: str | None) -> Path:
    # A finished download is used again only if its digest proves that it is the right file.
    if path.exists() and sha256 is not None and sha256_of(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # The part's name carries what it is a part of, so that another URL never continues it.
    tag = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:12]
    part = path.with_name(f"{path.name}.{tag}.part")
    try:
        for attempt in Retrying(
            retry=retry_if_exception_type((_InterruptedError, requests.ConnectionError, requests.Timeout)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=0.5, max=8),
            reraise=True,
        ):
            with attempt:
                _transfer(url, part)
    except _InterruptedError as error:
        raise DataError(f"{url}: {error}; run again to continue") from error
    except requests.RequestException as error:
        raise DataError(f"{url}: {_reason(error)}") from error
    except OSError as error:
        raise DataError(f"{part}: {error.strerror}") from error
    if sha256 is not None:
        try:
            _check_digest(part, sha256, url)
        except DataError:
            part.unlink()
            raise
    part.replace(path)
    return path


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
            raise _InterruptedError("the file changed on the server")
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise _InterruptedError("the server continued at another place")
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
            raise _InterruptedError(f"the connection broke at {have} of {total or '?'} bytes") from error
    if total is not None and have < total:
        raise _InterruptedError(f"the connection ended at {have} of {total} bytes")

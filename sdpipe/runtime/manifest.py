"""SHA256SUMS: the digests of deployed files, as `sha256sum` writes and `sha256sum --check` reads them."""

import hashlib
import os
import re
from pathlib import Path

from sdpipe.errors import ModelError

NAME = "SHA256SUMS"

_MAX_BYTES = 2**20
_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)")


def check_against_manifest(path: Path, raw: bytes) -> Path:
    """Compare a file's bytes with the manifest in its folder, or in the folder above. Returns the manifest.

    Names in it are relative to its own folder. Raises ModelError if there is no manifest, if it cannot be
    read, if it does not list the file, or if the digest is another.
    """
    manifest = find_manifest(path)
    name = str(_absolute(path).relative_to(manifest.parent))
    expected = read_manifest(manifest).get(name)
    if expected is None:
        raise ModelError(f"{path}: {manifest} does not list {name}")
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise ModelError(
            f"{path}: not the file that was deployed: its SHA-256 is {found[:16]}..., {manifest} says "
            f"{expected[:16]}..."
        )
    return manifest


def find_manifest(path: Path) -> Path:
    """The manifest that speaks for a file. Raises ModelError if there is none."""
    folder = _absolute(path).parent
    for each in (folder, folder.parent):
        if (each / NAME).is_file():
            return each / NAME
    raise ModelError(f"{path}: no {NAME} in its folder or the one above to verify it with")


def _absolute(path: Path) -> Path:
    # Not resolve(): a link in models/, as DVC may place one, is verified as what it is called there.
    return Path(os.path.abspath(path))  # noqa: PTH100


def read_manifest(manifest: Path) -> dict[str, str]:
    """Digests by file name, relative to the manifest's folder. Raises ModelError if it is damaged."""
    try:
        with manifest.open("rb") as stream:
            text = stream.read(_MAX_BYTES + 1).decode()
    except (OSError, ValueError) as error:
        raise ModelError(f"{manifest}: cannot be read: {error}") from error
    if len(text) > _MAX_BYTES:
        raise ModelError(f"{manifest}: over {_MAX_BYTES:,} bytes, no list of digests")
    digests: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line.removesuffix("\r"))  # lines as Windows ends them
        if match is None:
            raise ModelError(f"{manifest}: line {number} is not as sha256sum writes it")
        name = _unescape(match["name"]) if match["escaped"] else match["name"]
        if digests.setdefault(os.path.normpath(name), match["digest"]) != match["digest"]:
            raise ModelError(f"{manifest}: line {number} gives {name} a second digest")
    return digests


def _unescape(name: str) -> str:
    """Names with a newline, a carriage return or a backslash are escaped by coreutils."""
    characters = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}
    return re.sub(r"\\[\\nr]", lambda match: characters[match[0]], name)

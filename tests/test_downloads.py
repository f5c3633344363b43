"""What servers do that a download must get the right file from, or say plainly that it cannot."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from loopback import Files
from published_sets import left_behind, sha256

from sdpipe.data import sources
from sdpipe.data.sources import has_sha256, locate
from sdpipe.errors import DataError

CONTENT = np.random.default_rng(0).bytes(60_000)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts nothing needs to be waited for."""
    monkeypatch.setattr(sources, "wait_exponential", lambda **_wait: lambda _state: 0.0)


def download(url: str, folder: Path, content: bytes | None) -> bytes:
    """content: what the digest is of; None: without a digest."""
    check = None if content is None else has_sha256(sha256(content))
    return locate(url, "", folder, check).read_bytes()


def test_a_gzip_file_that_is_called_encoded_is_kept_as_it_is(tmp_path: Path, files: Files) -> None:
    """Apache's AddEncoding says it of each .gz, whatever was accepted."""
    packed = gzip.compress(CONTENT)
    files.content["/a.tar.gz"] = packed
    files.cut_after, files.cuts_left = 20_000, 1
    for encoding in ("gzip", "x-gzip"):
        files.headers = {"Content-Encoding": encoding}
        assert download(f"{files.url}a.tar.gz", tmp_path / encoding, packed) == packed


def test_answers_shorter_than_what_was_asked_for_are_put_together(tmp_path: Path, files: Files) -> None:
    """RFC 9110 15.3.7 allows them: three of 20,000 bytes at most, behind one that broke."""
    files.content["/a.zip"] = CONTENT
    files.cut_after, files.cuts_left, files.most = 16_384, 1, 20_000
    assert download(f"{files.url}a.zip", tmp_path, CONTENT) == CONTENT
    assert [wanted for _, wanted in files.requests] == [None, "bytes=16384-", "bytes=36384-", "bytes=56384-"]


def test_a_range_that_does_not_say_how_long_the_file_is(tmp_path: Path, files: Files) -> None:
    """The first answer did."""
    files.content["/a.zip"], files.says_total = CONTENT, False
    files.cut_after, files.cuts_left, files.most = 16_384, 1, 20_000
    assert download(f"{files.url}a.zip", tmp_path, CONTENT) == CONTENT


def test_a_date_names_a_version_too(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to ranges leave it out; nothing that has come is asked for again."""
    monkeypatch.setattr(sources, "ATTEMPTS", 3)
    files.content["/a.zip"], files.etag = CONTENT, "Sat, 28 Nov 2026 10:00:00 GMT"
    files.cut_after, files.cuts_left = 20_000, 2
    assert download(f"{files.url}a.zip", tmp_path, None) == CONTENT
    assert [wanted for _, wanted in files.requests] == [None, "bytes=20000-", "bytes=40000-"]


@pytest.mark.parametrize("names_versions", [True, False])
def test_two_versions_of_a_file_are_not_mixed(
    tmp_path: Path, files: Files, names_versions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a digest: If-Range asks for the same version, or all is asked for again."""
    other = CONTENT[::-1]
    files.content["/a.zip"], files.etag = CONTENT, '"1"' if names_versions else None
    files.cut_after, files.cuts_left = 20_000, 1
    transfer = sources._transfer

    def then_change(url: str, part: sources._Part) -> bool:
        try:
            return transfer(url, part)
        finally:
            files.content["/a.zip"], files.etag = other, '"2"' if names_versions else None

    monkeypatch.setattr(sources, "_transfer", then_change)
    assert download(f"{files.url}a.zip", tmp_path, None) == other


def test_without_a_digest_the_same_version_is_continued(tmp_path: Path, files: Files) -> None:
    files.content["/a.zip"], files.etag = CONTENT, '"1"'
    files.cut_after, files.cuts_left = 20_000, 1
    assert download(f"{files.url}a.zip", tmp_path, None) == CONTENT
    assert [wanted for _, wanted in files.requests] == [None, "bytes=20000-"]


def test_a_part_that_cannot_be_made_is_a_data_error(tmp_path: Path, files: Files) -> None:
    """Its name is longer than the file's, which the system still takes."""
    name = f"{'x' * 240}.zip"
    files.content[f"/{name}"] = CONTENT
    with pytest.raises(DataError, match="File name too long"):
        download(f"{files.url}{name}", tmp_path, None)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, files: Files, status: int) -> None:
    """Twice in all here."""
    files.content["/a.zip"], files.busy = CONTENT, [status]
    assert download(f"{files.url}a.zip", tmp_path, CONTENT) == CONTENT
    files.content["/b.zip"], files.busy = CONTENT, [status] * 2
    with pytest.raises(DataError, match=rf"/b\.zip: the server answered {status} .*; run again to continue"):
        download(f"{files.url}b.zip", tmp_path, CONTENT)


def test_without_a_digest_nothing_is_kept_that_would_not_be_used(tmp_path: Path, files: Files) -> None:
    """Each time all of it is asked for again."""
    files.content["/a.zip"], files.cut_after, files.cuts_left = CONTENT, 20_000, 4
    with pytest.raises(DataError, match="the connection broke"):
        download(f"{files.url}a.zip", tmp_path, None)
    assert left_behind(tmp_path) == ["a.zip.lock"]


def test_a_weak_etag_names_no_version(tmp_path: Path, files: Files) -> None:
    """Files of other bytes may have it (RFC 9110 8.8.1): as without any, all is asked for again."""
    files.content["/a.zip"], files.headers = CONTENT, {"ETag": 'W/"1"'}
    files.cut_after, files.cuts_left = 20_000, 1
    assert download(f"{files.url}a.zip", tmp_path, None) == CONTENT
    assert [wanted for _, wanted in files.requests] == [None, None]


def test_a_range_from_another_place_is_not_put_behind_what_came(tmp_path: Path, files: Files) -> None:
    """Nor kept: the next run starts over."""
    files.content["/a.zip"], files.headers = CONTENT, {"Content-Range": "bytes 10000-49999/60000"}
    files.cut_after, files.cuts_left = 20_000, 1
    with pytest.raises(DataError, match=r"/a\.zip: the server continued at another place"):
        download(f"{files.url}a.zip", tmp_path, CONTENT)
    assert download(f"{files.url}a.zip", tmp_path, CONTENT) == CONTENT
    assert [wanted for _, wanted in files.requests] == [None, "bytes=20000-", None]


@pytest.mark.parametrize("length", ["abc", "", "60000, 60000", "-1"])
def test_a_length_that_is_no_number_is_as_none(tmp_path: Path, files: Files, length: str) -> None:
    files.content["/a.zip"] = CONTENT
    files.headers = {"Content-Length": length, "Connection": "close"}
    assert download(f"{files.url}a.zip", tmp_path, CONTENT) == CONTENT


@pytest.mark.parametrize(
    "place", ["http://[bad/", "http://a..b/", "http://" + "x" * 70 + ".invalid/", "http:///", "ftp://h/"]
)
def test_a_redirection_to_no_address(tmp_path: Path, files: Files, place: str) -> None:
    files.content["/a.zip?sig=SECRET"], files.status = b"", 302
    files.headers = {"Location": f"{place}?a='b'&sig=SECRET"}
    with pytest.raises(DataError, match=r"127\.0\.0\.1:\d+/a\.zip: ") as caught:
        download(f"{files.url}a.zip?sig=SECRET", tmp_path, None)
    assert "SECRET" not in str(caught.value)


def test_a_redirection_without_an_end(tmp_path: Path, files: Files) -> None:
    files.content["/a.zip"], files.status, files.headers = b"", 302, {"Location": "/a.zip"}
    message = f"{files.url}a.zip: it leads from address to address without an end"
    with pytest.raises(DataError, match=f"^{message}$"):
        download(f"{files.url}a.zip", tmp_path, CONTENT)


@pytest.mark.parametrize("status", [206, 416])
def test_an_answer_to_a_range_that_nobody_asked_for(tmp_path: Path, files: Files, status: int) -> None:
    files.content["/a.zip"], files.status = CONTENT, status
    with pytest.raises(DataError, match=r"/a\.zip: the (server continued at another place|file changed)"):
        download(f"{files.url}a.zip", tmp_path, None)


def test_passwords_are_not_shown(tmp_path: Path, files: Files) -> None:
    url = files.url.replace("http://", "http://me:secret@")
    with pytest.raises(DataError, match=r"http://\*\*\*@127.*404"):
        download(f"{url}gone.zip", tmp_path, None)


@pytest.mark.parametrize("path", ["", "..", "a/..", "a%00.zip"])
def test_addresses_without_a_name_for_the_file(tmp_path: Path, files: Files, path: str) -> None:
    """Nothing is written beside the folder for downloads."""
    with pytest.raises(DataError, match="404"):
        download(files.url + path, tmp_path / "dl", None)
    assert left_behind(tmp_path) == ["dl", "dl/download.lock"]

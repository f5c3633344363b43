"""`sdpipe predict --allow-url`, and the addresses that it refuses."""

import gzip
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from encoded_pictures import write_folder
from test_predict_use import CLI, ENVIRONMENT, call

from sdpipe.errors import ImageError
from sdpipe.runtime import sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


class Server(http.server.BaseHTTPRequestHandler):
    """Pictures and bad habits."""

    picture = b""
    asked = threading.Event()

    def do_GET(self) -> None:
        self.asked.set()
        if self.path in ("/good.png", "/long.png"):
            self.send_response(200)
            length = 10**12 if self.path == "/long.png" else len(self.picture)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(self.picture)
        elif self.path in ("/gzip.png", "/identity.png", "/aws-chunked.png", "/aws-chunked,%20gzip.png"):
            coding = self.path[1:].removesuffix(".png").replace("%20", " ")
            self.send_response(200)
            self.send_header("Content-Encoding", coding)
            self.end_headers()
            self.wfile.write(gzip.compress(self.picture) if "gzip" in coding else self.picture)
        elif self.path.startswith("/cut-off.png?"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.picture) + 1))
            self.end_headers()
            self.wfile.write(self.picture[: int(self.path.partition("?")[2])])
        elif self.path.startswith("/chunks.png?"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.picture), self.picture)
            self.wfile.write(chunk[: len(chunk) - int(self.path.partition("?")[2])])
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/silent.png":
            time.sleep(3)
        elif self.path.split("?")[0] in ("/slow.png", "/drip.png"):
            if self.path.startswith("/slow.png"):
                self.send_response(200)
                self.end_headers()
            for _ in range(60):
                self.wfile.write(b"x")
                time.sleep(0.1)
        else:
            self.send_error(404)

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_arguments: object) -> None:
        """Whoever gave up on a slow answer has hung up."""


@contextmanager
def listening(
    handler: type[http.server.BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Its address; no proxy stands before it."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Server.picture = (folder / "0.png").read_bytes()
    with listening(Server, monkeypatch) as address:
        yield address


def test_urls_need_the_flag(folder: Path, server: str, rgb_model_path: Path) -> None:
    """Without it one plain line names it; with it the picture is the file's, redirects on http included."""
    refused = call(f"{server}/good.png", "--model", rgb_model_path)
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"error: {server}/good.png: is a URL, and nothing is fetched without --allow-url\n"
    )
    urls = (f"{server}/good.png", f"{server}/to/{server}/good.png", folder / "0.png")
    result = call(*urls, "--allow-url", "--model", rgb_model_path, "--json")
    assert result.exit_code == 0, result.output
    tops = [json.loads(line)["top"] for line in result.stdout.splitlines()]
    assert tops[0] == tops[1] == tops[2]


@pytest.mark.slow
def test_urls_that_are_refused(server: str, rgb_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other schemes, also by redirect, what is not there, too large, or slow in its body or its head."""
    monkeypatch.setattr(sources, "TIMEOUT_S", 1.0)
    port = server.rpartition(":")[2]
    wrong_port = f"http://127.0.0.1:{65536 + int(port)}/good.png"  # modulo 65,536 it is the server's
    expected = {
        "file:///etc/passwd": "only http:// and https:// are fetched",
        "ftp://127.0.0.1/x.png": "only http:// and https:// are fetched",
        "data://x": "only http:// and https:// are fetched",
        f"{server}/to/file:///etc/passwd": "cannot be fetched: HTTP Error 302",
        f"{server}/to/ftp://127.0.0.1/x.png": "cannot be fetched: ",
        f"{server}/to/http://127.0.0.1:99999999999999999999/x.png": "cannot be fetched: ",
        f"{server}/gone.png": "cannot be fetched: HTTP Error 404",
        f"{server}/long.png": "is over 256 MiB",
        f"{server}/slow.png": "no whole answer in 1 s",
        f"{server}/drip.png": "no whole answer in 1 s",
        "http://127.0.0.1:1/x.png": "cannot be fetched: ",
        "http://[/": "cannot be fetched: ",
        f"{server}/gzip.png": "cannot be fetched: the server packs it as gzip, which was not asked for",
        f"{server}/aws-chunked,%20gzip.png": "cannot be fetched: the server packs it as gzip, which was not",
        wrong_port: "cannot be fetched: Port out of range 0-65535",
        f"{server}/to/{wrong_port}": "cannot be fetched: Port out of range 0-65535",
    }
    result = call(*expected, "--allow-url", "--model", rgb_model_path, "--json")
    assert result.exit_code == 1
    found = {line["file"]: line["message"] for line in map(json.loads, result.stdout.splitlines())}
    for url, message in expected.items():
        assert found[url].startswith(message), (url, found[url])
    assert len(result.stderr.splitlines()) == len(expected)


@pytest.mark.parametrize(
    "path", ["cut-off.png?0", "cut-off.png?50", "cut-off.png?9999", "chunks.png?5", "chunks.png?50"]
)
def test_a_connection_that_ends_early_is_said_to(server: str, path: str) -> None:
    """Neither a damaged picture nor an empty one, nor the whole one, which lacks its last byte here."""
    with pytest.raises(ImageError, match="the connection ended before the whole file") as caught:
        sources.read_url(f"{server}/{path}")
    assert caught.value.code == "not_fetched"


@pytest.mark.parametrize("coding", ["identity", "aws-chunked"])
def test_codings_that_leave_the_bytes_are_taken(server: str, coding: str) -> None:
    """Pictures in object stores bear such a header."""
    assert sources.read_url(f"{server}/{coding}.png") == Server.picture


def test_an_answer_in_chunks_is_read_whole(server: str) -> None:
    assert sources.read_url(f"{server}/chunks.png?0") == Server.picture


@pytest.mark.slow
@pytest.mark.parametrize("path", ["slow.png", "silent.png"])
def test_no_fetch_ends_with_half_an_answer(server: str, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Whoever waits may be late: then the fetch itself gives up, and hands over nothing cut off."""
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.5)
    answer = sources._fetch(f"{server}/{path}")
    assert isinstance(answer, ImageError)
    assert str(answer) == "no whole answer in 0.5 s"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_what_is_being_fetched(
    server: str, rgb_model_path: Path, signal_number: int
) -> None:
    """Each of these takes 6 s, one after the other; the process used to live on until the last one came."""
    urls = [f"{server}/slow.png?{number}" for number in range(8)]
    # A shell's background jobs ignore SIGINT, and so would what they start.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {CLI}"
    command = [sys.executable, "-c", code, "predict", "--allow-url", "--model", str(rgb_model_path), *urls]
    Server.asked.clear()
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert Server.asked.wait(60)
        started = time.monotonic()
        process.send_signal(signal_number)
        assert process.wait(60) == 128 + signal_number
        assert time.monotonic() - started < 5
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("flags", [(), ("--allow-url",)])
def test_a_password_in_a_url_is_neither_sent_nor_shown(
    server: str, rgb_model_path: Path, flags: tuple[str, ...]
) -> None:
    """It was taken for a part of the host's name, which no one knows."""
    url = f"{server}/good.png".replace("://", "://user:secret@")
    Server.asked.clear()
    result = call(*flags, "--model", rgb_model_path, url)
    assert (result.exit_code, Server.asked.is_set()) == (1, False)
    assert result.stderr.startswith(f"error: {url.replace('user:secret', '***')}: ")
    assert ("user and password in a URL are not sent" in result.stderr) == bool(flags)


def test_an_at_sign_in_a_path_is_no_password(server: str, rgb_model_path: Path) -> None:
    urls = [f"{server}/photos/2026:11/gone@2x.png", f"{server}/gone@2x.png"]
    result = call("--allow-url", "--model", rgb_model_path, *urls)
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == urls


@pytest.mark.parametrize("name", ["ä.png", "a b.png"])
def test_a_url_that_cannot_be_asked_for_is_one_line(server: str, rgb_model_path: Path, name: str) -> None:
    result = call("--allow-url", "--model", rgb_model_path, f"{server}/{name}")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {server}/{name}: cannot be fetched: ")
    assert ("%C3%A4" in result.stderr) == (name == "ä.png")

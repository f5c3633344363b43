"""A file server on loopback that can do what bad servers do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What the server serves and how; `requests` lists (path, Range header) as they came."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.status = 200
        self.busy: list[int] = []  # statuses of the next answers, which bring nothing
        self.cut_after: int | None = None  # bytes of a body, then the connection breaks
        self.cuts_left = 0
        self.knows_ranges = True
        self.etag: str | None = None  # sent where it has quotes, else a date, and compared with If-Range
        self.most: int | None = None  # bytes of an answer to a range
        self.says_total = True  # in answers to ranges
        self.headers: dict[str, str] = {}  # more of them, or others
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""


@contextmanager
def serve() -> Iterator[Files]:
    files = Files()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            files.requests.append((self.path, wanted))
            body = files.content.get(self.path)
            if body is None or files.busy:
                self.send_error(404 if body is None else files.busy.pop(0))
                return
            if self.headers.get("If-Range") not in (None, files.etag):
                wanted = None
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and files.knows_ranges else 0
            if start >= len(body) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else files.status)
            rest = body[start:]
            headers = {"Content-Length": str(len(rest))}
            if start:
                rest = rest[: files.most]
                end = start + len(rest) - 1
                headers["Content-Range"] = f"bytes {start}-{end}/{len(body) if files.says_total else '*'}"
                headers["Content-Length"] = str(len(rest))
            if files.etag is not None and files.etag.startswith('"'):
                headers["ETag"] = files.etag
            elif files.etag is not None and not start:  # RFC 9110 15.3.7
                headers["Last-Modified"] = files.etag
            for name, value in (headers | files.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if files.cut_after is not None and files.cuts_left:
                files.cuts_left -= 1
                rest = rest[: files.cut_after]
                self.close_connection = True
            self.wfile.write(rest)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

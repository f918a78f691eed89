"""A proxy in front of an S3 server that answers with errors, resets connections and truncates bodies, at random."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("500", "503", "reset-before", "reset-after", "truncated")
"""Errors of the server; a connection that ends before or after the server has done its work; half of a body."""
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class Faults(ThreadingHTTPServer):
    """Forwards requests to `upstream`.

    The fate of the n-th request for the same thing depends on that and the seed alone, and not on the order in which
    the threads of a client ask.
    """

    def __init__(self, upstream: str, rate: float, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urllib.parse.urlsplit(upstream).netloc
        self.rate = rate
        """Share of requests that fail."""
        self.injected: Counter[str] = Counter()
        """Kind -> number; `forwarded` counts the requests without a fault."""
        self.address = f"http://127.0.0.1:{self.server_port}"
        self._seed, self._asked = seed, Counter[str]()
        self._lock = threading.Lock()

    def fate(self, request: str) -> str:
        with self._lock:
            self._asked[request] += 1
            drawn = random.Random(f"{self._seed} {request} {self._asked[request]}")
            kind = drawn.choice(KINDS) if drawn.random() < self.rate else "forwarded"
            self.injected[kind] += 1
            return kind

    def handle_error(self, *_: object) -> None:
        """Print nothing: clients leave broken connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faults

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fate = self.server.fate(f"{self.command} {self.path} {self.headers.get('Range')}")
        if fate in ("500", "503"):
            self._refuse(int(fate), {"500": "InternalError", "503": "SlowDown"}[fate])
        elif fate == "reset-before":
            self._reset()
        else:
            self._forward(body, fate)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815

    def _forward(self, body: bytes, fate: str) -> None:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if fate == "reset-after":
            self._reset()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fate == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        else:
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>again</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        """Close with a reset instead of a regular end."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def between(upstream: str, rate: float, seed: int) -> Iterator[Faults]:
    """A `Faults` proxy in front of the server `upstream`, for the length of the block."""
    with Faults(upstream, rate, seed) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
        yield proxy
        proxy.shutdown()

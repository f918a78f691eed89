"""A local forward proxy that restricts a downloader to public addresses and limits bytes and time.

The downloader opens any URL in its input. Every request and every redirect passes through the proxy, so each hop is
screened:

- only `http://` and `CONNECT` (https) are accepted, to ports 80, 443 and above 1023;
- the name is resolved once, here. A private, loopback, link-local or reserved address is refused, and the connection
  goes to the screened address, so that a second DNS lookup cannot return another one;
- a response is cut off at `max_bytes`, a connection after `seconds`, all traffic at `total_bytes`.

TLS is passed through: for https the proxy sees addresses and sizes, but no content or headers, and the client verifies
the certificate. Clients without the password, such as other users of the machine, are refused. The proxy connects
directly and cannot be chained behind another proxy.
"""

from __future__ import annotations

import base64
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import urlsplit

from tasks.web import addresses

REFUSED = 470
"""Status for a refused address; servers do not use it, so it differs from a 403 of the site."""
EXHAUSTED = 471
"""Status of all requests after `total_bytes`."""
PIECE = 65536
CONNECT_SECONDS = 10.0
HEAD_SLACK = 65536
"""Bytes allowed in addition to the body, for headers and TLS."""
HOP_HEADERS = {"connection", "proxy-connection", "proxy-authorization", "keep-alive", "te", "upgrade", "host"}


@dataclass(frozen=True)
class Limits:
    """Limits of one connection and of all connections."""

    max_bytes: int
    """Of one response."""
    seconds: float
    """Duration of one connection."""
    total_bytes: int
    """Of all responses."""
    connections: int
    """Concurrent connections; further ones wait."""
    allow_private_addresses: bool = False


@dataclass
class Proxy:
    """A running proxy."""

    url: str
    """With the password; a value for `http_proxy` and `https_proxy`."""
    received: int = 0
    """Bytes of all responses so far."""
    counts: Counter[str] = field(default_factory=Counter)
    """Connections by outcome: "passed", "broken", "refused address", "unreachable", "cut by bytes", "cut by time"..."""


@contextmanager
def running(limits: Limits, host: str = "127.0.0.1") -> Iterator[Proxy]:
    """Run a proxy on a free port of `host` within the block."""
    password = secrets.token_urlsafe(24)
    server = _Server((host, 0), _Handler)
    server.limits = limits
    server.credentials = "Basic " + base64.b64encode(f"afterimage:{password}".encode()).decode()
    server.free = threading.Semaphore(limits.connections)
    server.lock = threading.Lock()
    server.proxy = Proxy(f"http://afterimage:{password}@{host}:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    limits: Limits
    credentials: str
    free: threading.Semaphore
    lock: threading.Lock
    proxy: Proxy

    def count(self, end: str) -> None:
        with self.lock:
            self.proxy.counts[end] += 1

    def take(self, amount: int) -> bool:
        """Count received bytes; False if `total_bytes` is exceeded."""
        with self.lock:
            self.proxy.received += amount
            return self.proxy.received <= self.limits.total_bytes

    def handle_error(self, *_: object) -> None:
        """Ignore clients and sites that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = CONNECT_SECONDS

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        self._serve(host.strip("[]"), port, None)

    def do_GET(self) -> None:
        try:
            parts = urlsplit(self.path)
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host = None
        if not host or parts.scheme != "http" or "@" in parts.netloc:
            self._refuse(REFUSED, "Address not allowed", "refused address")
            return
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = [f"{self.command} {target} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
        head += [f"{name}: {value}" for name, value in self.headers.items() if name.lower() not in HOP_HEADERS]
        self._serve(host, str(port), ("\r\n".join(head) + "\r\n\r\n").encode("latin-1"))

    do_HEAD = do_GET  # noqa: N815

    def _serve(self, host: str, port: str, head: bytes | None) -> None:
        self.close_connection = True
        if not secrets.compare_digest(self.headers.get("Proxy-Authorization", ""), self.server.credentials):
            self._refuse(407, "Password needed", "wrong password")
            return
        with self.server.free:
            if not self.server.take(0):
                self._refuse(EXHAUSTED, "Byte limit reached", "over the byte limit")
                return
            deadline = time.monotonic() + self.server.limits.seconds
            site = self._connected(host, port)
            if site is None:
                return
            with site:
                if head is None:
                    self.send_response_only(200, "Connection established")
                    self.end_headers()
                else:
                    site.sendall(head)
                end = "broken"
                with suppress(OSError):
                    end = self._carry(site, deadline, both=head is None)
                self.server.count(end)
                if end != "passed":
                    self._reset()

    def _connected(self, host: str, port: str) -> socket.socket | None:
        """Connect to a screened address of `host`; None after a refusal was sent."""
        number = int(port) if port.isdecimal() else 0
        if number not in (80, 443) and not 1024 <= number < 65536:
            self._refuse(REFUSED, "Port not allowed", "refused address")
            return None
        try:
            found = addresses.lookup(host, number)
            if not self.server.limits.allow_private_addresses:
                addresses.require_public(host, found)
        except addresses.PrivateAddressError:
            self._refuse(REFUSED, "Address not allowed", "refused address")
            return None
        except (OSError, UnicodeError):
            self._refuse(502, "Name not found", "unreachable")
            return None
        for address in found:
            with suppress(OSError):
                return socket.create_connection((address, number), CONNECT_SECONDS)
        self._refuse(502, "No connection", "unreachable")
        return None

    def _carry(self, site: socket.socket, deadline: float, both: bool) -> str:
        """Forward bytes until one side closes or a limit is reached, and return the outcome."""
        received = 0
        allowed = self.server.limits.max_bytes + HEAD_SLACK
        with selectors.DefaultSelector() as waiting:
            waiting.register(site, selectors.EVENT_READ, self.connection)
            if both:
                waiting.register(self.connection, selectors.EVENT_READ, site)
            while True:
                left = deadline - time.monotonic()
                ready = waiting.select(left) if left > 0 else []
                if not ready:
                    return "cut by time"
                for key, _ in ready:
                    source, sink = cast("socket.socket", key.fileobj), cast("socket.socket", key.data)
                    data = source.recv(PIECE)
                    if not data:
                        return "passed"
                    if source is site:
                        received += len(data)
                        if received > allowed or not self.server.take(len(data)):
                            return "cut by bytes"
                    sink.settimeout(max(0.1, left))
                    sink.sendall(data)

    def _reset(self) -> None:
        """Reset the connection of the client, so that a truncated response does not look complete."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def _refuse(self, status: int, reason: str, end: str) -> None:
        self.server.count(end)
        self.close_connection = True
        self.send_response_only(status, reason)
        if status == 407:
            self.send_header("Proxy-Authenticate", "Basic")
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing: there may be millions of requests."""

"""A receiver of webhooks on this machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver(ThreadingHTTPServer):
    """Keeps the JSON of every POST; answers with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.received: list[dict[str, Any]] = []
        self.refused: list[str] = []
        """Requests for another path or of another type than JSON."""
        self.address = f"http://127.0.0.1:{self.server_port}/hook/a-secret-path"

    def wait_for(self, event: str, seconds: float) -> dict[str, Any]:
        """Return the first notification of a kind."""
        return self.wait_until(lambda received: [body for body in received if body["event"] == event], seconds)[0]

    def wait_until(self, condition: Callable[[list[dict[str, Any]]], Any], seconds: float) -> Any:
        """Return the value of `condition` of the notifications, once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := condition(self.received)):
            assert time.monotonic() < deadline, f"received: {self.received}; refused: {self.refused}"
            time.sleep(0.1)
        return value


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/hook/a-secret-path" and self.headers["Content-Type"] == "application/json":
            self.server.received.append(json.loads(body))
            self.send_response(self.server.status)
        else:
            self.server.refused.append(f"{self.path} of type {self.headers['Content-Type']}")
            self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A `Receiver` for the length of the block."""
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever, args=(0.05,), daemon=True).start()
        yield receiver
        receiver.shutdown()

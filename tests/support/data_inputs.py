"""Inputs of the data stages' tests (images, folders, archives), a local web server, and stages as processes."""

import hashlib
import importlib
import io
import json
import socket
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import yaml

from tasks.params import DownloadParams, IngestParams, composition
from tasks.runtime import integrity, stage
from tests.support import commands

ROOT = Path(__file__).parents[2]


def picture(seed: int, size: tuple[int, int] = (12, 12), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def folder_params(path: Path | None = None, **others: object) -> DownloadParams:
    return DownloadParams.model_validate({"source": "folder", **({"path": str(path)} if path else {}), **others})


def ingest_params(**others: object) -> IngestParams:
    return IngestParams.model_validate({"shards": 1, "held_out_fraction": 0.25, **others})


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def call_stage(name: str, *paths: Path, params: Path) -> subprocess.CompletedProcess[str]:
    """Run a stage with its command line in this process, which has its packages loaded."""
    function = getattr(importlib.import_module(f"tasks.{name}"), name)
    return commands.call(lambda: stage.main(function), *map(str, paths), "--params", str(params))


def run_stage(name: str, *paths: Path, params: Path) -> subprocess.CompletedProcess[str]:
    """Run a stage as a process, as DVC does."""
    command = [sys.executable, "-m", f"tasks.{name}", *map(str, paths), "--params", str(params)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run_and_measure(name: str, *paths: Path, params: Path) -> tuple[subprocess.CompletedProcess[str], int]:
    """Run a stage as a process; returns it with the peak memory in bytes, its child processes included."""
    command = [sys.executable, "-m", f"tasks.{name}", *map(str, paths), "--params", str(params)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        watched, peak, finished = psutil.Process(process.pid), [0], threading.Event()

        def watch() -> None:
            while not finished.wait(0.05):
                with suppress(psutil.Error):
                    family = [watched, *watched.children(recursive=True)]
                    peak[0] = max(peak[0], sum(member.memory_info().rss for member in family))

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, err = process.communicate()
        finished.set()
        watcher.join()
    return subprocess.CompletedProcess(command, process.returncode, out, err), peak[0]


def write_params(path: Path, **sections: dict[str, object]) -> Path:
    """The default parameters with some values changed: `ingest={"shards": 1}` and so on."""
    document = composition.compose("digits", [])
    for section, values in sections.items():
        document[section] |= values
    path.write_text(yaml.safe_dump(document))
    return path


@dataclass
class Site:
    """A web server on 127.0.0.1 that answers ranges, redirects, and breaks connections on request."""

    address: str
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Close every connection after so many bytes of a body."""
    ranges: bool = True
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request."""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Path -> further headers of its answer."""
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Path -> status and headers of the answer to requests without `Authorization: Bearer right`."""
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization header of each request."""


class SiteServer(ThreadingHTTPServer):
    """Serves a `Site` on a free port; clients that leave early print no traceback."""

    def __init__(self, certificate: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), SiteHandler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.site = Site(f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_port}")

    def handle_error(self, *_: object) -> None:
        """Print nothing."""


class SiteHandler(BaseHTTPRequestHandler):
    """Answers one request from the `Site` of its server."""

    server: SiteServer

    def do_GET(self) -> None:
        site, authorization = self.server.site, self.headers["Authorization"]
        site.requests.append((self.path, self.headers["Range"]))
        site.tokens.append((self.path, authorization))
        if self.path in site.refusals and authorization != "Bearer right":
            status, headers = site.refusals[self.path]
            self._send_head(status, {**headers, "Content-Length": "0"})
        elif self.path in site.redirects:
            self._send_head(302, {"Location": site.redirects[self.path]})
        elif self.path in site.files:
            self._send_file(site.files[self.path], site)
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        site = self.server.site
        headers = {"Content-Length": str(len(site.files.get(self.path, b"")))} | site.headers.get(self.path, {})
        self._send_head(200 if self.path in site.files else 404, headers)

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_file(self, data: bytes, site: Site) -> None:
        """Send a file, or its end from the start of the requested range, up to `site.cut_after` bytes."""
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and site.ranges else 0
        if start and start >= len(data):
            self.send_error(416)
            return
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        length = {"Content-Length": str(len(data) - start)}
        self._send_head(206 if start else 200, ranged | length | site.headers.get(self.path, {}))
        end = len(data) if site.cut_after is None else start + site.cut_after
        self.wfile.write(data[start:end])

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[Site]:
    """A `Site` for the length of the block; https with `certificate` (and its key), else http."""
    server = SiteServer(certificate)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.site
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Relay:
    """A TCP relay to a server on 127.0.0.1 that breaks connections."""

    port: int
    cuts: list[int]
    """For each of the next connections, the number of bytes of the answer after which it breaks."""


@contextmanager
def cutting(address: str, cuts: list[int]) -> Iterator[Relay]:
    """A `Relay` to the server at `address` for the length of the block; it breaks one connection for each of `cuts`.

    If an answer ends before the cut, the cut applies to the next connection.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    relay = Relay(listener.getsockname()[1], list(cuts))
    upstream = ("127.0.0.1", int(address.rpartition(":")[2]))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def carry(client: socket.socket) -> None:
        with client, socket.create_connection(upstream) as server, suppress(OSError):
            threading.Thread(target=pump, args=(client, server), daemon=True).start()
            seen = 0
            while data := server.recv(4096):
                seen += len(data)
                if relay.cuts and seen >= relay.cuts[0]:
                    client.sendall(data[: len(data) - (seen - relay.cuts.pop(0))])
                    client.shutdown(socket.SHUT_RDWR)
                    server.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=carry, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield relay
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def random_cuts(size: int, count: int = 20) -> list[int]:
    """Positions at which to break `count` connections; together they transfer less than an answer of `size` bytes."""
    return np.random.default_rng(0).integers(3000, size // (count + 1), count).tolist()


def record_checksums(images: Path) -> None:
    """Record the checksums of shards that a test edited, so that they count as valid data and not as damaged."""
    index = json.loads((images / "index.json").read_text())
    index["files"] = integrity.checksums(images, "*.parquet")
    (images / "index.json").write_text(json.dumps(index))

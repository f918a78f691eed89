"""A headless Chromium controlled over the DevTools protocol: open a page, collect its errors, take screenshots.

Why not a library: the wheel of Playwright contains a Node.js runtime and supports only the browser builds that it
downloads; pyppeteer is unmaintained; Selenium needs a chromedriver of the same version. The dozen commands that are
needed here work over `websockets` with any installed Chromium.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from websockets.sync.client import connect

from models.json_files import JsonObject

if TYPE_CHECKING:
    from websockets.sync.connection import Connection

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers seldom allow the namespaces it needs; only our own pages are opened
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
Message: TypeAlias = JsonObject  # of the DevTools protocol, whose schema no package here contains
START_SECONDS = 60
SETTLE_SECONDS = 1.5


def find() -> str | None:
    """Path of a Chromium or Chrome on this machine; None without one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@dataclass
class Page:
    """One tab, with its errors and requests since the last `visit`."""

    connection: Connection
    session: str
    errors: list[str] = field(default_factory=list)
    """Errors and warnings of the console, uncaught exceptions, failed requests."""
    requests: list[str] = field(default_factory=list)
    """Requested addresses in order, without data: URIs."""
    _events: list[str] = field(default_factory=list)
    _last: int = 0

    def visit(self, address: str, timeout: float = 30) -> None:
        """Open `address` and wait for its load event. Raises `TimeoutError` without one."""
        # The empty page first: another fragment of the same page would not load anything.
        for target in ("about:blank", address):
            self.errors.clear()
            self.requests.clear()
            self._events.clear()
            self.command("Page.navigate", url=target)
            until = time.monotonic() + timeout
            while "Page.loadEventFired" not in self._events:
                self._receive(until)

    def settle(self, timeout: float = 30) -> None:
        """Wait until the visible text stays the same for `SETTLE_SECONDS`, for pages that scripts fill."""
        until, same_since, text = time.monotonic() + timeout, time.monotonic(), None
        while time.monotonic() < until and time.monotonic() - same_since < SETTLE_SECONDS:
            now = self.evaluate("document.body.innerText")
            if now != text or not now.strip():
                text, same_since = now, time.monotonic()
            time.sleep(0.2)

    def evaluate(self, script: str) -> Any:  # any JSON value
        """Value of a JavaScript expression, awaited if it is a promise. Raises `RuntimeError` if it throws."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "script failed"))
        return answer["result"].get("value")

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """Set the window to `width` by `height` CSS pixels, each `scale` device pixels wide."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def theme(self, name: str) -> None:
        """Prefer the colour scheme "light" or "dark"."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def remember(self, values: dict[str, str]) -> None:
        """Set `values` in the local storage of every site before its scripts run."""
        lines = [f"localStorage.setItem({json.dumps(key)}, {json.dumps(value)});" for key, value in values.items()]
        self.command("Page.addScriptToEvaluateOnNewDocument", source=f"try {{ {''.join(lines)} }} catch {{}}")

    def screenshot(self, path: Path, full: bool = False) -> None:
        """Write a PNG of the window or, with `full`, of the whole page."""
        answer = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))

    def command(self, method: str, timeout: float = 60, **parameters: object) -> Message:
        """Send a DevTools command to the tab and return its result. Raises `RuntimeError` if it is refused."""
        self._last += 1
        message = {"id": self._last, "sessionId": self.session, "method": method, "params": parameters}
        self.connection.send(json.dumps(message))
        until = time.monotonic() + timeout
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return result_of(answer)

    def _receive(self, until: float) -> Message:
        message: Message = json.loads(self.connection.recv(timeout=max(0.0, until - time.monotonic())))
        if "method" in message:
            self._collect(message["method"], message["params"])
        return message

    def _collect(self, event: str, details: Message) -> None:
        self._events.append(event)
        if event == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in details["args"]))
        elif event == "Runtime.exceptionThrown":
            self.errors.append(details["exceptionDetails"]["text"])
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}".strip())
        elif event == "Network.loadingFailed":
            self.errors.append(f"request failed: {details['errorText']} {details.get('blockedReason', '')}".strip())
        elif event == "Network.requestWillBeSent" and not details["request"]["url"].startswith("data:"):
            self.requests.append(details["request"]["url"])


def result_of(answer: Message) -> Message:
    """The result in the answer to a command."""
    result: Message = answer["result"]
    return result


@contextmanager
def browse(executable: str) -> Iterator[Page]:
    """Start a browser with a new profile and yield its one tab; the browser ends with the block.

    Raises `RuntimeError` if the browser does not start within `START_SECONDS`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile), process), max_size=None) as connection:
                yield _tab(connection)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """WebSocket address of the browser, which it writes into its profile."""
    until = time.monotonic() + START_SECONDS
    port_file = profile / "DevToolsActivePort"
    while time.monotonic() < until and process.poll() is None:
        lines = port_file.read_text().splitlines() if port_file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise RuntimeError(f"the browser did not start (exit code {process.poll()})")


def _tab(connection: Connection) -> Page:
    def ask(number: int, method: str, **parameters: object) -> Message:
        connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer: Message = json.loads(connection.recv(timeout=START_SECONDS))
            if answer.get("id") == number:
                return result_of(answer)

    target = ask(1, "Target.createTarget", url="about:blank")["targetId"]
    page = Page(connection, ask(2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"], _last=2)
    for domain in ("Page", "Runtime", "Log", "Network"):
        page.command(f"{domain}.enable")
    return page

"""No process of the project sends requests to this machine through a proxy."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tasks.runtime import loopback, tracking
from tests.support.data_inputs import serving

ROOT = Path(__file__).resolve().parents[2]
DEAD = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), DEAD)


@pytest.mark.parametrize(
    ("environment", "lower", "upper"),
    [
        ({}, "localhost,127.0.0.1,::1", "localhost,127.0.0.1,::1"),
        ({"no_proxy": "a.org"}, "a.org,localhost,127.0.0.1,::1", "a.org,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "a.org, ::1"}, "a.org,::1,localhost,127.0.0.1", "a.org,::1,localhost,127.0.0.1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,localhost,127.0.0.1,::1", "b,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*", "*"),
    ],
)
def test_listed_hosts_are_kept_and_loopback_is_added_once(environment, lower, upper):
    environment = dict(environment)
    for _ in range(2):
        loopback.exempt(environment)
        assert environment == {"no_proxy": lower, "NO_PROXY": upper}


@pytest.fixture
def behind_a_dead_proxy(monkeypatch):
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_http_clients_reach_loopback_without_the_proxy(behind_a_dead_proxy, monkeypatch):
    import httpx
    import requests

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    loopback.exempt(os.environ)
    with serving() as site:
        site.files["/health"] = b"OK"
        for host in ("127.0.0.1", "localhost"):
            url = site.address.replace("127.0.0.1", host) + "/health"
            assert urllib.request.urlopen(url, timeout=5).read() == b"OK"  # noqa: S310
            assert requests.get(url, timeout=5).text == "OK"
            assert httpx.get(url, timeout=5).text == "OK"
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://example.org/", timeout=5)


def test_mlflow_on_loopback_is_probed_directly(behind_a_dead_proxy, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with serving() as site:
        site.files["/health"] = b"OK"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", site.address)
        tracking.prepare()
        assert site.requests == [("/health", None)]


STARTED = {
    "infra/run.py": """
import infra.run
infra.run.dvc.command = lambda *_: [sys.executable, "-c", SHOW]
sys.argv = ["run"]
infra.run.main()
""",
    "infra/ui.py": """
import infra.ui
os.execv = lambda *_: exec(SHOW)
sys.argv = ["ui", "--port", PORT]
infra.ui.main()
""",
    "flows/server.py": """
from flows import server
print("NO_PROXY", server.environment(Path(FOLDER), 1)["no_proxy"])
""",
    "tasks/runtime/stage.py": """
from tasks.runtime import stage
def shown(raw: Path) -> None:
    exec(SHOW)
sys.argv = ["shown", "raw"]
stage.main(shown)
""",
}


@pytest.mark.parametrize("place", STARTED)
def test_every_started_process_exempts_loopback(place, tmp_path, migrated_database):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"} | PROXIES
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    environment |= {"AFTERIMAGE_SCRATCH": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    show = "import os; print('NO_PROXY', os.environ.get('no_proxy'))"
    names = f"SHOW, PORT, FOLDER = {show!r}, '{port}', {str(tmp_path)!r}"
    command = [sys.executable, "-c", f"import os, sys\nfrom pathlib import Path\n{names}\n{STARTED[place]}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    found = re.findall(r"^NO_PROXY (.*)$", done.stdout, re.MULTILINE)
    assert found and set(found) == {"localhost,127.0.0.1,::1"}, done.stdout + done.stderr

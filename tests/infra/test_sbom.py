"""The bill of materials names every locked package once, in the form of CycloneDX 1.6."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from infra import sbom
from tasks.runtime.errors import StageError
from tests.support.commands import call
from tests.support.documents import ROOT


def test_every_locked_package_is_in_the_bill_with_its_purl_and_the_bytes_repeat(tmp_path):
    for name in ("one.json", "two.json"):
        done = call(sbom.main, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    bill = json.loads((tmp_path / "one.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", bill["serialNumber"]
    )
    references = [component["bom-ref"] for component in bill["components"]]
    assert len(references) == len(set(references))
    for component in bill["components"]:
        assert component["type"] == "library" and component["name"] and component["version"]
        assert component["purl"] == f"pkg:pypi/{component['name']}@{component['version'].replace('+', '%2B')}"
    pinned = {
        line.partition(";")[0].strip().replace("==", "@")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    }
    required = {f"{c['name']}@{c['version']}" for c in bill["components"] if c["scope"] == "required"}
    assert required == pinned
    gradio = next(component for component in bill["components"] if component["name"] == "gradio")
    assert gradio["scope"] == "optional"
    assert {"name": "afterimage:lock", "value": "infra/demo.lock"} in gradio["properties"]
    assert bill["dependencies"] == [{"ref": bill["metadata"]["component"]["bom-ref"], "dependsOn": references}]


def test_a_line_that_is_no_pin_is_refused_and_another_version_gives_another_number(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lock = tmp_path / "requirements.lock"
    lock.write_text("# words\nTorch_Vision==1.0+cpu ; sys_platform == 'linux'\n")
    first = sbom.bill(tmp_path)
    assert first["components"][0]["purl"] == "pkg:pypi/torch-vision@1.0%2Bcpu"
    assert {"name": "afterimage:marker", "value": "requirements.lock: sys_platform == 'linux'"} in first["components"][
        0
    ]["properties"]
    lock.write_text("torch-vision==1.1\n")
    assert sbom.bill(tmp_path)["serialNumber"] != first["serialNumber"]
    lock.write_text("numpy>=2\n")
    with pytest.raises(StageError, match=r"requirements\.lock:1 is no exact pin: numpy>=2"):
        sbom.bill(tmp_path)


def audit(address: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "AUDIT_URL": address, "no_proxy": "127.0.0.1"}
    return subprocess.run([ROOT / ".ci" / "audit"], env=environment, capture_output=True, text=True, timeout=60)


def test_the_audit_is_skipped_with_a_message_where_its_data_cannot_be_reached(tmp_path):
    """A mirror without advisories would otherwise report that no package has a vulnerability."""
    (tmp_path / "json").write_text('{"info": {"name": "jinja2"}}')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as mirror:
        threading.Thread(target=mirror.serve_forever, args=(0.05,), daemon=True).start()
        for address in ("http://127.0.0.1:9/", f"http://127.0.0.1:{mirror.server_port}/json"):
            done = audit(address)
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"audit: skipped, because {address} holds no advisories or cannot be reached\n"
        mirror.shutdown()
    assert ".ci/audit" in (ROOT / ".github" / "workflows" / "weekly.yml").read_text(encoding="utf-8")

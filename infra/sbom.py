"""Write a software bill of materials of the locked packages: CycloneDX 1.6, JSON.

    python -m infra.sbom [--out sbom.cdx.json]

The packages are those of `requirements.lock` (required), and of the locks of the extras and of img2dataset's
environments (optional). The same locks give the same bytes: there is no time, and the serial number is derived from the
content. CUDA's packages are not in the locks; the build of torch brings them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from tasks.runtime import atomic
from tasks.runtime.errors import StageError

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("sbom.cdx.json")
MAIN = "requirements.lock"
OTHERS = ("infra/*.lock", "tasks/transfer/*.lock")
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;]+)\s*(?:;\s*(.+))?")


@dataclass(frozen=True, order=True)
class Pin:
    """A pinned package of a lock."""

    name: str
    """Normalized as PyPI does: lower case, hyphens."""
    version: str
    lock: str
    marker: str
    """Where it is installed, such as `sys_platform == 'darwin'`; empty means everywhere."""

    @property
    def purl(self) -> str:
        """The package URL; '+' of a local version is percent-encoded."""
        return f"pkg:pypi/{self.name}@{self.version.replace('+', '%2B')}"


class Bill(TypedDict):
    """The document, with the names of CycloneDX."""

    bomFormat: str
    specVersion: str
    serialNumber: str
    version: int
    metadata: dict[str, object]
    components: list[dict[str, object]]
    dependencies: list[dict[str, object]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.sbom", description="Write a bill of materials (CycloneDX 1.6) of the locked packages."
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help=f"default {OUT}")
    out = parser.parse_args().out
    try:
        document = bill(ROOT)
        atomic.write_json(out, document)
    except (StageError, OSError) as error:
        sys.exit(f"sbom: error: {error}")
    print(f"sbom: {len(document['components'])} packages in {out}")


def bill(root: Path) -> Bill:
    """Return the bill of materials of the work tree `root` as JSON. Raises `StageError` for a line that is no pin."""
    with (root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    found: dict[str, list[Pin]] = {}
    for pin in sorted(_pins(root)):
        found.setdefault(pin.purl, []).append(pin)
    components = [_component(purl, pins) for purl, pins in found.items()]
    reference = f"pkg:pypi/{project['name']}@{project['version']}"
    application = {
        "type": "application",
        "bom-ref": reference,
        "name": project["name"],
        "version": project["version"],
        "purl": reference,
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([application, components], sort_keys=True))
    return Bill(
        bomFormat="CycloneDX",
        specVersion="1.6",
        serialNumber=f"urn:uuid:{serial}",
        version=1,
        metadata={"component": application},
        components=components,
        dependencies=[{"ref": reference, "dependsOn": list(found)}],
    )


def _component(purl: str, pins: list[Pin]) -> dict[str, object]:
    """Return one package, with the locks and the markers that name it."""
    facts = {("afterimage:lock", pin.lock) for pin in pins}
    facts |= {("afterimage:marker", f"{pin.lock}: {pin.marker}") for pin in pins if pin.marker}
    return {
        "type": "library",
        "bom-ref": purl,
        "name": pins[0].name,
        "version": pins[0].version,
        "scope": "required" if any(pin.lock == MAIN for pin in pins) else "optional",
        "purl": purl,
        "properties": [{"name": name, "value": value} for name, value in sorted(facts)],
    }


def _pins(root: Path) -> Iterator[Pin]:
    files = [root / MAIN, *(file for pattern in OTHERS for file in sorted(root.glob(pattern)))]
    for file in files:
        lock = file.relative_to(root).as_posix()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            text = line.partition(" #")[0].strip()
            if not text or text.startswith(("#", "-")):
                continue
            match = PIN.fullmatch(text)
            if match is None:
                raise StageError(f"{lock}:{number} is no exact pin: {text}; write the locks again: make lock")
            name, version, marker = match.groups()
            yield Pin(re.sub(r"[-_.]+", "-", name).lower(), version, lock, (marker or "").strip())


if __name__ == "__main__":
    main()

"""`make reproduce`: compute a registered model again from its commit and parameters, and compare the two.

    python -m infra.reproduce 3 [--name afterimage-digits] [--share-cache]

The commit, with the changes that were recorded but not committed, is checked out in a temporary clone with the recorded
`params.yaml`. All stages up to `package` run there with an empty DVC cache, unless the work tree's is shared. Exits
with 1 if weights or metrics differ. On a CPU with the same number of threads, they are equal bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows import dvc, repro
from tasks.params import ParamsError, load
from tasks.params.redaction import redacted
from tasks.runtime import lineage, loopback, tracking, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from tasks.provenance.version import Record

TARGET = "package"
"""The last stage that computes files; `register` would add a version."""
MODEL = Path("outputs") / "model"


@dataclass(frozen=True)
class Difference:
    """A value that differs between the registered and the reproduced model."""

    name: str
    registered: str
    reproduced: str


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.reproduce", description="Compute a registered model again in a temporary clone; compare."
    )
    parser.add_argument("version", help="number or alias, such as 3 or champion")
    parser.add_argument("--name", help="registered model (default: register.model_name of params.yaml)")
    parser.add_argument("--share-cache", action="store_true", help="use the DVC cache of the work tree: only compare")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="clone to this new folder and keep it")
    given = parser.parse_args()
    loopback.exempt(os.environ)
    try:
        name = given.name or load().register_.model_name
        separator = "/" if given.version.isdigit() else "@"
        differences = reproduce(f"models:/{name}{separator}{given.version}", given.share_cache, given.keep)
    except (StageError, ParamsError) as error:
        sys.exit(f"reproduce: error: {redacted(str(error))}")
    for one in differences:
        print(f"reproduce: {one.name}: registered {one.registered}, reproduced {one.reproduced}")
    if differences:
        sys.exit(f"reproduce: {len(differences)} values differ")
    print("reproduce: weights and metrics are equal")


def reproduce(uri: str, share_cache: bool, keep: Path | None = None) -> list[Difference]:
    """Compute the version that `uri` names again, and return what differs.

    Raises:
        StageError: if its record is incomplete, the commit is not in this repository, or a stage fails.
    """
    client = tracking.connect()
    from tasks.provenance import version as versions  # after MLflow's environment was set

    version = versions.find(client, uri)
    record = versions.read_record(client, version)
    with tempfile.TemporaryDirectory(prefix="afterimage-reproduce-") as scratch:
        clone = (keep or Path(scratch) / "clone").resolve()
        if clone.exists():
            raise StageError(f"{clone} exists; name a folder that does not")
        _prepare(clone, record, share_cache)
        print(f"reproduce: {uri} in {clone}", flush=True)
        _run(clone)
        registered = versions.download(version, Path(scratch) / "registered")
        return list(differences(registered, clone / MODEL))


def _prepare(clone: Path, record: Record, share_cache: bool) -> None:
    from tasks.provenance import outputs, source
    from tasks.provenance import version as versions

    root = workspace.root()
    recorded = record.facts["git"]
    if recorded["commit"] is None:
        raise StageError("no commit was recorded with this version, so that its code is unknown")
    source.check_out(root, recorded["commit"], clone)
    source.apply_changes(clone, recorded)
    outputs.write_state(clone, versions.stages(record), record.files.get(lineage.PARAMS))
    if share_cache:
        source.share_dvc_settings(root, clone, (root / source.dvc(root, "cache", "dir").strip()).resolve())
    else:
        (clone / lineage.LOCK).unlink()
    _bring_source(root, clone)


def _bring_source(root: Path, clone: Path) -> None:
    """Link images of the user that lie in the work tree and are not committed into the clone."""
    path = load(clone / lineage.PARAMS).download.path
    if not (clone / path).exists() and (root / path).exists():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).symlink_to((root / path).resolve())


def _run(clone: Path) -> None:
    """Run the chain up to `TARGET` with a store and a scratch folder of its own."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{clone / 'mlflow.db'}",
        "AFTERIMAGE_SCRATCH": str(clone / ".scratch"),
    }
    kept: list[str] = []
    with dvc.leashed(dvc.command("repro", TARGET), environment, folder=clone) as running:
        for line in repro.lines(running.output):
            print(line, flush=True)
            kept.append(line)
        code = running.process.wait()
    if code:
        raise StageError(f"the chain failed in the clone: {dvc.error(kept)}")


def differences(registered: Path, reproduced: Path) -> Iterator[Difference]:
    """Yield the weights and metrics in which two model folders differ."""
    from tasks.formats import model_folder
    from tasks.runtime import integrity, measures

    folders = (registered, reproduced)
    weights = [integrity.checksums(folder / model_folder.PIPELINE, "*.safetensors") for folder in folders]
    measured = [measures.read(folder / model_folder.MEASUREMENTS) for folder in folders]
    metrics = [{"fingerprint": each.fingerprint, **each.flat()} for each in measured]
    for first, second in (weights, metrics):
        for name in sorted(first.keys() | second.keys()):
            if first.get(name) != second.get(name):
                yield Difference(name, str(first.get(name)), str(second.get(name)))


if __name__ == "__main__":
    main()

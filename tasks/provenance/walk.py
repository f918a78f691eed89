"""Verify a model version: every record from the registry down to the bytes, by computing the hashes again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from mlflow.exceptions import MlflowException

from models.hashing import folder_sha256
from tasks.provenance import objects, outputs, prefect_run, source
from tasks.provenance import version as versions
from tasks.provenance.checks import Check
from tasks.runtime import lineage, tracking
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from models.json_files import JsonObject
    from tasks.provenance.outputs import Places
    from tasks.provenance.version import Record

SHORT = 12
COMPUTED = "outputs/model"
"""The output of the stage `package`, which `register` logs as it is."""
IMAGES = "data/images"


def verify(client: MlflowClient, version: ModelVersion, places: Places) -> Check:
    """Return the tree of checks of `version`; each failed one says what differs."""
    decision = version.tags.get(tracking.PROMOTION, "no decision on it")
    top = Check(f"models:/{version.name}/{version.version}", True, f"registered; gates: {decision}")
    with tempfile.TemporaryDirectory(prefix="afterimage-verify-") as scratch:
        model, clone = Path(scratch) / "model", Path(scratch) / "clone"
        top.below += [
            _step("model files", lambda: _model_files(version, model)),
            _step("MLflow run", lambda: _run(client, version)),
        ]
        try:
            record = versions.read_record(client, version)
            stages = versions.stages(record)
        except StageError as error:
            top.below.append(Check("record", False, str(error)))
            return top
        top.below[-1].below += [
            _step("dvc.lock", lambda: _lock(version, record)),
            _step("params.yaml", lambda: _params(record)),
        ]
        commit = _step("git commit", lambda: _commit(places.root, record, clone))
        if commit.ok:
            commit.below += [
                _step("uncommitted changes", lambda: _changes(record, clone)),
                _step("code", lambda: _code(stages, clone, places.root)),
            ]
            outputs.write_state(clone, stages, record.files.get(lineage.PARAMS))
        kept = outputs.Outputs(outputs.of(stages), places, Path(scratch) / "cache")
        files = kept.check(clone if commit.ok else None)
        if COMPUTED in kept.recorded and model.is_dir():
            files.below.append(_step("registered files", lambda: _registered(kept, model)))
        if IMAGES in kept.recorded:
            files.below.append(_step("data", lambda: _data(version, kept)))
        top.below += [commit, files, prefect_run.check(record.facts["prefect_flow_run"])]
    return top


def _step(name: str, work: Callable[[], str]) -> Check:
    """Run one check, which returns what it found or raises."""
    try:
        return Check(name, True, work())
    except (StageError, objects.MissingObjectError, objects.DamagedObjectError) as error:
        return Check(name, False, str(error))


def _require_equal(found: str, recorded: str, what: str) -> str:
    if found != recorded:
        raise StageError(f"{what} {found[:SHORT]} differs from the recorded {recorded[:SHORT]}")
    return f"{what} {found[:SHORT]}"


def _model_files(version: ModelVersion, folder: Path) -> str:
    """Download the files of the version to `folder`, and compare their hash with the version's tag."""
    found = folder_sha256(versions.download(version, folder))
    return _require_equal(found, version.tags[versions.CONTENT_KEY], "content")


def _run(client: MlflowClient, version: ModelVersion) -> str:
    try:
        run = client.get_run(version.run_id)
    except MlflowException:
        raise StageError(f"run {version.run_id} is gone") from None
    if run.info.lifecycle_stage != "active":
        raise StageError(f"run {version.run_id} was deleted; restore it: mlflow runs restore --run-id {version.run_id}")
    _require_equal(run.data.tags.get(tracking.TRAIN_KEY, "none"), version.tags[tracking.TRAIN_KEY], "training key")
    return f"{run.info.run_name} ({run.info.run_id}), {run.info.status}"


def _lock(version: ModelVersion, record: Record) -> str:
    """Compare the hash of the recorded entries with the version's tag, and the kept file with the entries."""
    stages = versions.stages(record)
    _require_equal(lineage.digest(stages), version.tags[f"{versions.TAG}dvc_lock_sha256"], "sha256 of dvc.lock")
    text = record.files.get(lineage.LOCK)
    if text is not None and (yaml.safe_load(text) or {}).get("stages") != stages:
        raise StageError("the artifact dvc.lock differs from the recorded entries")
    return f"{len(stages)} stages, sha256 {lineage.digest(stages)[:SHORT]}"


def _params(record: Record) -> str:
    """Compare the recorded parameters with those that `dvc.lock` holds for each stage."""
    if lineage.PARAMS not in record.files:
        return "those of the commit, because an earlier release registered the version"
    document = yaml.safe_load(record.files[lineage.PARAMS]) or {}
    compared = 0
    for stage, entry in versions.stages(record).items():
        for name, value in entry.get("params", {}).get(lineage.PARAMS, {}).items():
            compared += 1
            if _at(document, name) != value:
                raise StageError(f"{name} of the recorded params.yaml is not what stage {stage} ran with")
    return f"{compared} sections and keys are those that the stages ran with"


def _at(document: JsonObject, name: str) -> object:
    value: object = document
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _commit(root: Path, record: Record, clone: Path) -> str:
    commit = record.facts["git"]["commit"]
    if commit is None:
        raise StageError("no commit was recorded, because the chain ran outside of a Git repository")
    source.check_out(root, commit, clone)
    return f"{commit[:SHORT]} {source.git(clone, 'log', '-1', '--format=%cs %s')}"


def _changes(record: Record, clone: Path) -> str:
    recorded = record.facts["git"]
    code_left_out = {name for name, reason in recorded["left_out"].items() if reason != lineage.NOT_CODE}
    if code_left_out or recorded["diff_is_cut"]:
        missing = ", ".join(sorted(code_left_out)) or "the end of a long diff"
        raise StageError(f"the record of uncommitted changes lacks {missing}; commit before a run to be kept")
    source.apply_changes(clone, recorded)
    lines = len(recorded["diff"].splitlines())
    return f"{lines} lines of a recorded diff apply to the commit" if lines else "none in code and parameters"


def _code(stages: JsonObject, clone: Path, root: Path) -> str:
    """Compare the files at the commit with the hashes in `dvc.lock` of everything that is no output of a stage."""
    made = outputs.of(stages)
    hashes: dict[str, str] = {}
    for entry in stages.values():
        hashes |= {dep["path"]: dep["md5"] for dep in entry.get("deps", []) if dep["path"] not in made and "md5" in dep}
    outside = {path for path in hashes if not (clone / path).exists() and (root / path).exists()}
    different = [
        path
        for path, md5 in sorted(hashes.items())
        if not ((root if path in outside else clone) / path).exists()
        or objects.path_md5((root if path in outside else clone) / path) != md5
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise StageError(f"not as recorded at this commit: {', '.join(different[:3])}{more}")
    beyond = f", {len(outside)} of them outside of the repository" if outside else ""
    return f"{len(hashes)} dependencies of the stages have the recorded hashes{beyond}"


def _registered(kept: outputs.Outputs, model: Path) -> str:
    written = objects.folder_md5(objects.listing(model))
    return _require_equal(written, kept.recorded[COMPUTED], f"md5 of {COMPUTED}")


def _data(version: ModelVersion, kept: outputs.Outputs) -> str:
    """Compare the hash of the images, which is the version's tag, with the index among the recorded outputs."""
    sha256 = json.loads(kept.read(IMAGES, "index.json"))["sha256"]
    return _require_equal(sha256, version.tags[f"{versions.TAG}data_sha256"], "sha256 of the images")

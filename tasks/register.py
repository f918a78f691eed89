"""Stage `register`: log runs and the model version in MLflow, and decide on the alias `champion`.

The stage is idempotent and always runs. Training run, evaluation run and model version are found by a key derived from
their contents and created if they are missing, so a new or emptied server is filled again from `reports/` and
`outputs/model`. The alias `challenger` is set to this version; `champion` moves to it if the gates pass, otherwise the
reason is stored as a tag of the version. A refusal is a result, not an error.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.hashing import file_sha256
from tasks.formats import model_folder
from tasks.params import RegisterParams
from tasks.pictures.index import read_index
from tasks.registration import champions, gates, unchanged
from tasks.registration.gates import Judged
from tasks.runtime import lineage, locks, measures, run_labels, stage, tracking, workspace
from tasks.runtime.codec_quality import RECONSTRUCTIONS, of_codec
from tasks.runtime.tracking import CHALLENGER, PROMOTION

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from models.json_files import JsonObject
    from tasks.runtime.measures import Measurements

CODE = Path("mlflow") / "diffusion_model.py"
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pillow", "pydantic")
TAG = "afterimage."
CONTENT_KEY = f"{TAG}content_key"
LOGGED_MODEL = f"{TAG}logged_model"
DESCRIPTION_CHARACTERS = 4900
GRIDS = ("grid_guided", "grid_unguided", "grid_slowest", "grid_nearest", "grid_control")
REPORT, REPORT_SHA256 = "report", f"{TAG}report_sha256"


@dataclass(frozen=True)
class Sources:
    """What a champion is measured with, if its numbers were taken by another protocol."""

    judge: Path
    data: Path
    """Images."""
    evaluation: Path
    """Report of the challenger's evaluation, with its protocol."""


def register(
    model: Path,
    judge: Path,
    data: Path,
    training: Path,
    evaluation: Path,
    timing: Path,
    export: Path,
    edits: Path,
    editing: Path,
    figures: Path,
    page: Path,
    params: RegisterParams,
) -> None:
    """Find or create runs and model version in MLflow, set `challenger`, and let the gates decide on `champion`.

    `training`, `evaluation` (with its `timing`), `export`, `edits` with `editing`, and `page` with `figures` are the
    reports of those stages and of `visualize`; what MLflow lacks of them is logged again. A champion whose numbers have
    another fingerprint is measured again, with `judge` and `data` (images). Nothing is done if nothing has changed
    since the last registration (`tasks/registration/unchanged.py`).
    """
    inputs = (model, judge, data, training, evaluation, timing, export, edits, editing, figures, page)
    registration = unchanged.Registration(inputs, params)
    if (printed := registration.recorded()) is not None:
        print("\n".join(printed))
        return
    client = tracking.connect()  # before the import of `adapter`, which imports MLflow
    from tasks.registration import adapter
    from tasks.registration import edits as edit_results

    measured = measures.read(evaluation / measures.FILE)
    with locks.exclusive(workspace.scratch() / "locks" / "register.lock"):
        trained = _training_run(client, training, measured)
        judged = gates.judged(measured, model_folder.ExportReport.read(model / model_folder.EXPORT).min_psnr_db)
        version = _model_version(client, params.model_name, model, judged, trained, read_index(data).sha256)
        evaluated = _evaluation_run(client, training, evaluation, (timing, export), trained, version)
        edit_results.log(client, evaluated, edits, editing)
        _describe(client, (trained, evaluated), measured, page, figures)
        registered = client.get_registered_model(params.model_name)
        champion = champions.current(registered)
        if str(registered.aliases.get(CHALLENGER)) != str(version.version):
            client.set_registered_model_alias(params.model_name, CHALLENGER, version.version)
        sources = Sources(judge, data, evaluation)
        reason = _reason_against(client, version, champion, judged, sources, params)
        standing = _set_champion(client, version, champion, reason)
        adapted = adapter.register(client, params.model_name, model / model_folder.PIPELINE, trained)
        content = model_folder.content_key(model)[:12]
        lines = [
            f"register: {params.model_name} version {version.version}, {standing}",
            *([f"register: {adapted}"] if adapted else []),
            f"register: run {trained.info.run_name} ({trained.info.run_id}), content {content}",
        ]
        if not adapted:  # an adapter has artifacts of its own
            registration.record([trained.info.artifact_uri, evaluated.info.artifact_uri, version.source], lines)
    print("\n".join(lines))


def _read(path: Path) -> JsonObject:
    return json.loads(path.read_text(encoding="utf-8"))


def _training_run(client: MlflowClient, report: Path, measured: Measurements) -> Run:
    """Find or create the training run, and log every point and picture of `reports/train` and this evaluation."""
    facts = _read(report / "run.json")
    run = tracking.find_or_create_run(
        client,
        tracking.TRAIN_KEY,
        facts["train_key"],
        kind="training",
        params=facts["params"],
        dataset=facts["dataset"],
    )
    run_id = run.info.run_id
    _replay_history(client, run, report / "history.csv")
    images = tracking.logged_images(client, run_id)
    for path in sorted((report / "samples").glob("step-*.png")):
        step = int(path.stem.removeprefix("step-"))
        if ("samples", step) not in images:
            tracking.log_image(client, run_id, "samples", step, path)
    reconstructions = report / "codec" / RECONSTRUCTIONS
    if reconstructions.is_file() and ("reconstructions", 0) not in images:
        tracking.log_image(client, run_id, "reconstructions", 0, reconstructions)
    metrics = run_labels.evaluation_metrics(measured) | of_codec(report / "codec")
    changed = {name: value for name, value in metrics.items() if run.data.metrics.get(name) != value}
    if changed:
        client.log_batch(run_id, metrics=tracking.points(0, changed))
    if run.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")
    return run


def _describe(client: MlflowClient, runs: tuple[Run, Run], measured: Measurements, page: Path, figures: Path) -> None:
    """Log the report with the second of `runs`, the evaluation, and describe both with its numbers and a link."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

    evaluated = runs[1]
    digest = file_sha256(page)
    if evaluated.data.tags.get(REPORT_SHA256) != digest:
        client.log_artifact(evaluated.info.run_id, str(page), REPORT)
        client.log_artifacts(evaluated.info.run_id, str(figures), f"{REPORT}/{figures.name}")
        client.set_tag(evaluated.info.run_id, REPORT_SHA256, digest)
    run = f"#/experiments/{evaluated.info.experiment_id}/runs/{evaluated.info.run_id}"
    note = run_labels.description(measured, f"{run}/artifacts/{REPORT}/{page.name}")
    for each in runs:
        if each.data.tags.get(MLFLOW_RUN_NOTE) != note:
            client.set_tag(each.info.run_id, MLFLOW_RUN_NOTE, note)


def _replay_history(client: MlflowClient, run: Run, history: Path) -> None:
    """Log the rows of the loss history that the run lacks, for example after its server was lost."""
    logged = tracking.logged_steps(client, run)
    missing = []
    with history.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            curves = run_labels.training_metrics({name: float(value) for name, value in row.items() if value})
            values = {name: value for name, value in curves.items() if step not in logged.get(name, ())}
            missing += tracking.points(step, values)
    for start in range(0, len(missing), tracking.BATCH):
        client.log_batch(run.info.run_id, metrics=missing[start : start + tracking.BATCH])
    if missing:
        print(f"register: replayed {len(missing)} points of the training into MLflow")


def _evaluation_run(
    client: MlflowClient,
    training: Path,
    evaluation: Path,
    beside: tuple[Path, ...],
    parent: Run,
    version: ModelVersion,
) -> Run:
    """Find or create the nested run of this evaluation.

    It has the protocol as parameters, the numbers as metrics, and tables, grids and the files `beside` as artifacts.
    """
    from tasks.evaluation.protocol import FILE, Protocol

    facts, protocol = _read(training / "run.json"), Protocol.read(evaluation / FILE).to_json()
    measured = measures.read(evaluation / measures.FILE)
    identity = json.dumps([facts["train_key"], protocol, measured.model_dump(mode="json")], sort_keys=True)
    run = tracking.find_or_create_run(
        client,
        tracking.EVALUATION_KEY,
        hashlib.sha256(identity.encode("utf-8")).hexdigest(),
        kind="evaluation",
        params=_flat(protocol),
        dataset=facts["dataset"],
        parent=parent.info.run_id,
    )
    if run.info.status == "FINISHED":
        return run
    run_id, steps = run.info.run_id, int(facts["params"]["train.steps"])
    metrics = run_labels.evaluation_metrics(measured)
    missing = {name: value for name, value in metrics.items() if name not in run.data.metrics}
    client.log_batch(run_id, metrics=tracking.points(steps, missing, model_id=version.tags[LOGGED_MODEL]))
    client.log_artifacts(run_id, str(evaluation), "evaluation")
    for file in beside:
        client.log_artifact(run_id, str(file))
    images = tracking.logged_images(client, run_id)
    for name in GRIDS:
        path = evaluation / f"{name}.png"
        if path.is_file() and (name, steps) not in images:
            tracking.log_image(client, run_id, name, steps, path)
    client.set_terminated(run_id, "FINISHED")
    return run


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten a nested mapping: keys are joined by dots, lists become JSON."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _model_version(
    client: MlflowClient, name: str, model: Path, judged: Judged, trained: Run, data_sha256: str
) -> ModelVersion:
    """Find or create the version of the registered model with the content of this folder."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    key = model_folder.content_key(model)
    found = client.search_model_versions(f"name = '{name}' and tags.`{CONTENT_KEY}` = '{key}'")
    if found:
        version = min(found, key=lambda version: int(version.version))
        if not client.list_logged_model_artifacts(version.tags[LOGGED_MODEL]):
            _log_model(version.tags[LOGGED_MODEL], name, model)
        return version
    print(f"register: a new version of {name} (content {key[:12]})", flush=True)
    try:
        client.create_registered_model(
            name, description="Diffusion model of the pipeline Afterimage; see its versions."
        )
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    facts = lineage.lineage(data_sha256)
    for path, reason in sorted(facts["git"]["left_out"].items()):
        print(f"register: the lineage leaves out the changes of {path}: {reason}")
    experiment = tracking.experiment_id(client)
    # A killed registration or a deleted version may have left one.
    left = client.search_logged_models([experiment], f"tags.`{CONTENT_KEY}` = '{key}'", max_results=1)
    logged = (
        left[0]
        if left
        else client.create_logged_model(
            experiment, name=name, source_run_id=trained.info.run_id, tags={CONTENT_KEY: key}
        )
    )
    _log_model(logged.model_id, name, model)
    client.log_dict(trained.info.run_id, facts, f"lineage/{key[:12]}.json")
    for file, text in lineage.state_files(facts).items():
        client.log_text(trained.info.run_id, text, f"lineage/{key[:12]}/{file}")
    tags = {
        CONTENT_KEY: key,
        LOGGED_MODEL: logged.model_id,
        tracking.TRAIN_KEY: trained.data.tags[tracking.TRAIN_KEY],
        **lineage.tags(facts),
    }
    tags |= {f"{TAG}{name}": value for name, value in judged.tags().items()}
    made = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=trained.info.run_id,
        tags=tags,
        description=(model / model_folder.CARD).read_text(encoding="utf-8").split("---", 2)[2][:DESCRIPTION_CHARACTERS],
        model_id=logged.model_id,
    )
    return _first_of(client, made, key)


def _first_of(client: MlflowClient, made: ModelVersion, key: str) -> ModelVersion:
    """Return the first version with this content; `made` is deleted if another machine made one meanwhile.

    The lock of this stage excludes processes that share the scratch folder; MLflow numbers the versions of all.
    """
    same = client.search_model_versions(f"name = '{made.name}' and tags.`{CONTENT_KEY}` = '{key}'")
    first = min([made, *same], key=lambda version: int(version.version))
    if first.version == made.version:
        return made
    client.delete_model_version(made.name, made.version)
    print(f"register: version {first.version} was registered elsewhere meanwhile, so version {made.version} is deleted")
    return first


def _log_model(model_id: str, name: str, model: Path) -> None:
    """Log the model's files and its code as the logged model `model_id`."""
    import mlflow

    conditioning = _read(model / model_folder.BUNDLE / "bundle.json")["conditioning"]
    needed = [*REQUIREMENTS, *(["tokenizers"] if conditioning == "text" else [])]
    example = {"label": 0, "seed": 0, "guidance": 1.5} if conditioning != "none" else {"seed": 0}
    mlflow.pyfunc.log_model(
        name=name,
        model_id=model_id,
        python_model=str(CODE),
        artifacts={"model": str(model)},
        input_example=[example],
        pip_requirements=[f"{package}=={_installed(package)}" for package in needed],
    )


def _installed(package: str) -> str:
    """Return the version of the installed package; the GPU build of ONNX Runtime has another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{package}-gpu")


def _reason_against(
    client: MlflowClient,
    version: ModelVersion,
    champion: int | None,
    judged: Judged,
    sources: Sources,
    params: RegisterParams,
) -> str | None:
    """Return why this version must not become champion; None if it may, or already is."""
    if champion == int(version.version):
        return None
    reason = champions.why_withdrawn(version) or gates.not_good_enough(judged, params)
    if reason or champion is None:
        return reason
    holder = client.get_model_version(version.name, str(champion))
    try:
        numbers = _numbers_of(client, holder, judged, sources)
    except Exception as error:  # a champion that cannot be measured stays champion, whatever the cause
        return f"champion version {champion} cannot be measured under this protocol ({_first_line(error)})"
    return gates.not_better(judged, numbers)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _numbers_of(client: MlflowClient, holder: ModelVersion, challenger: Judged, sources: Sources) -> Judged:
    """Return the champion's numbers that compare with the challenger's, from its tags or by measuring it again."""
    tagged = {name.removeprefix(TAG): value for name, value in holder.tags.items() if name.startswith(TAG)}
    known = gates.from_tags(tagged, challenger.headline)
    if known and known.fingerprint == challenger.fingerprint:
        return known
    from tasks.evaluation.protocol import FILE, Protocol
    from tasks.registration import measuring  # and PyTorch

    print(f"register: champion version {holder.version} has numbers of another protocol", flush=True)
    declared = Protocol.read(sources.evaluation / FILE)
    return measuring.numbers(client, holder, sources.judge, sources.data, declared)


def _set_champion(client: MlflowClient, version: ModelVersion, champion: int | None, reason: str | None) -> str:
    """Move the alias, or store the reason against it on the version; return the result as a clause."""
    if champion == int(version.version):
        return "challenger and champion"
    if reason is None:
        decision = f"promoted: beats version {champion}" if champion else "promoted: first to pass the gates"
        champions.set_champion(client, version, decision)
        return "challenger and champion"
    if version.tags.get(PROMOTION) != reason:
        client.set_model_version_tag(version.name, version.version, PROMOTION, reason)
    return (
        f"challenger; champion stays version {champion}: {reason}" if champion else f"challenger; no champion: {reason}"
    )


if __name__ == "__main__":
    stage.main(register)

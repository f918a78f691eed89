"""Access to MLflow: the connection, and runs that are found by their key.

A run is identified by a tag and not by its id: `afterimage.train_key` for a training run, `afterimage.evaluation_key`
for the evaluation nested in it. A process with the same key, on any machine, continues the same run. Call `connect()`
before any other function of this module. MLflow is imported inside functions: it takes over a second, and `connect()`
sets its environment variables first.
"""

from __future__ import annotations

import getpass
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params.redaction import redacted, without_user
from tasks.runtime import lineage, locks, loopback, run_labels, store, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "afterimage"
TRAIN_KEY = "afterimage.train_key"
EVALUATION_KEY = "afterimage.evaluation_key"
KIND = "afterimage.kind"
CHALLENGER, CHAMPION = "challenger", "champion"
"""Aliases of versions of a registered model."""
PROMOTION = "afterimage.promotion"
"""Tag of a model version: the reason why it became champion or not."""
PROBE_SECONDS = 2.0
BATCH = 1000
"""Most metrics in one call of MLflow."""


def prepare() -> None:
    """Start what `connect()` would wait for, so that the caller can work meanwhile.

    Checks that a tracking server answers, and creates the tables of a new SQLite file in another process.

    Raises:
        StageError: if a tracking server does not answer within 2 s.
    """
    path = _sqlite_path(_live_uri())
    if path is not None and not _exists(path):
        # Not a thread, which would hold Python's lock; not a fork, which is unsafe if the caller has threads.
        multiprocessing.get_context("spawn").Process(target=_make_database, args=(path,), daemon=True).start()


def _make_database(path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one handles Ctrl-C
    _ensure_migrated(path)


def connect() -> MlflowClient:
    """Connect to MLflow and return a client; the first call on a new SQLite file creates its tables.

    Several processes may call this at once.

    Raises:
        StageError: if a tracking server does not answer within 2 s, or the database is of another MLflow version.
    """
    uri = _live_uri()
    path = _sqlite_path(uri)
    if path is not None:
        _ensure_migrated(path)
        _update_artifact_paths(path)
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    mlflow.set_tracking_uri(uri)
    try:
        client = mlflow.MlflowClient()
        experiment_id(client)
    except (MlflowException, SQLAlchemyError, ModuleNotFoundError) as error:
        if "out-of-date database schema" in str(error):
            named = '"$MLFLOW_TRACKING_URI"' if "MLFLOW_TRACKING_URI" in os.environ else uri
            raise StageError(
                f"{redacted(uri)} was made by another version of MLflow; run 'mlflow db upgrade {named}' after a "
                "backup, or set MLFLOW_TRACKING_URI to a new database"
            ) from None
        if getattr(error, "get_http_status_code", int)() == 401:
            raise StageError(
                f"MLflow at {redacted(uri)} asks for a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from None
        raise StageError(f"MLflow at {redacted(uri)} refuses: {redacted(str(error).splitlines()[0])}") from None
    return client


def _update_artifact_paths(path: Path) -> None:
    with locks.exclusive(workspace.scratch() / "locks" / "mlflow-migration.lock"):
        store.require_sound(path)
        changed = store.update_artifact_paths(path)
    if changed:
        print(
            f"mlflow: the work tree was moved or copied; updated {changed} artifact paths in {path.name}",
            file=sys.stderr,
        )


def _live_uri() -> str:
    """Return the address of MLflow after checking that a server answers; silences its client."""
    uri = workspace.tracking_uri()
    loopback.exempt(os.environ)
    store.require_usable(uri)
    if uri.startswith(("http://", "https://")):
        _probe(uri)
    _quieten()
    return uri


def _probe(uri: str) -> None:
    """Raise `StageError` unless the server answers. MLflow's own client would block for minutes."""
    where = redacted(uri)
    remedy = "start it, correct MLFLOW_TRACKING_URI, or unset that to use the database in the work tree"
    health = f"{without_user(uri).rstrip('/')}/health"
    try:
        urllib.request.urlopen(health, timeout=PROBE_SECONDS).close()  # noqa: S310 - _live_uri() allows http and https only
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise StageError(f"MLflow at {where} answers 403; list this host in its --allowed-hosts") from None
        if error.code >= 500:
            raise StageError(f"MLflow at {where} answers {error.code}; {remedy}") from None
    except (OSError, ValueError) as error:
        reason = redacted(str(getattr(error, "reason", error)))
        raise StageError(
            f"MLflow at {where} does not answer within {PROBE_SECONDS:.0f} s ({reason}); {remedy}"
        ) from None


def _quieten() -> None:
    """Limit MLflow to error messages, short timeouts and no telemetry. Must be called before it is imported."""
    for name, value in {
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix(store.SQLITE)).resolve() if uri.startswith(store.SQLITE) else None


def _ensure_migrated(path: Path) -> None:
    """Create the tables of a new database under another name, then rename it, so that it is never half migrated."""
    if _exists(path):
        return
    with locks.exclusive(workspace.scratch() / "locks" / "mlflow-migration.lock"):
        if _exists(path):
            return
        print(f"mlflow: creating the database {path} (once, about 7 s)", file=sys.stderr, flush=True)
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        SqlAlchemyStore(f"{store.SQLITE}{fresh}", str(path.parent / store.ARTIFACTS)).engine.dispose()
        fresh.replace(path)


def _exists(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def experiment_id(client: MlflowClient) -> str:
    """Return the id of the experiment; creates or restores it if necessary, with an absolute path for artifacts."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        path = _sqlite_path(workspace.tracking_uri())
        artifacts = str(path.parent / store.ARTIFACTS) if path else None
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))
        except MlflowException:  # another process created it meanwhile
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def find_run(client: MlflowClient, tag: str, key: str) -> Run | None:
    """Return the run whose tag `tag` is `key`, or None; deleted runs are ignored."""
    found = client.search_runs([experiment_id(client)], f"tags.`{tag}` = '{key}'", max_results=1)
    return found[0] if found else None


def find_or_create_run(
    client: MlflowClient,
    tag: str,
    key: str,
    *,
    kind: str,
    params: Mapping[str, object],
    dataset: Mapping[str, str],
    parent: str | None = None,
) -> Run:
    """Return the run whose tag `tag` is `key`; creates it, or adds missing params and input to it.

    Args:
        client: A client of MLflow.
        tag: `TRAIN_KEY` or `EVALUATION_KEY`.
        key: Value of the tag.
        kind: "training" or "evaluation".
        params: Parameters of the run.
        dataset: `name`, `digest` (hex) and optionally `source` (a path or address) of the input.
        parent: Id of the run in which a new run is nested.

    Returns:
        The run. A new one has the status RUNNING until the caller ends it.
    """
    from mlflow.entities import Param
    from mlflow.utils.mlflow_tags import (
        MLFLOW_GIT_COMMIT,
        MLFLOW_PARENT_RUN_ID,
        MLFLOW_SOURCE_NAME,
        MLFLOW_SOURCE_TYPE,
        MLFLOW_USER,
    )

    with locks.exclusive(workspace.scratch() / "locks" / "mlflow-run.lock"):
        run = find_run(client, tag, key)
        if run is None:
            tags = {
                tag: key,
                KIND: kind,
                MLFLOW_SOURCE_NAME: f"tasks/{'train' if kind == 'training' else 'evaluate'}.py",
                MLFLOW_SOURCE_TYPE: "LOCAL",
                MLFLOW_USER: _user(),
            }
            environment = {MLFLOW_GIT_COMMIT: lineage.git_commit(), "afterimage.prefect_flow_run": lineage.flow_run()}
            tags |= {name: value for name, value in environment.items() if value}
            if parent:
                tags[MLFLOW_PARENT_RUN_ID] = parent
            label = run_labels.label(kind, key, params)
            made = client.create_run(experiment_id(client), tags=tags | label.tags, run_name=label.name)
            run = _first_of(client, made, tag, key)
        missing = [Param(name, str(value)) for name, value in sorted(params.items()) if name not in run.data.params]
        for start in range(0, len(missing), 100):
            client.log_batch(run.info.run_id, params=missing[start : start + 100])
        if run.inputs is None or not run.inputs.dataset_inputs:
            client.log_inputs(run.info.run_id, [_dataset_input(dataset, context=kind)])
    return run


def _first_of(client: MlflowClient, made: Run, tag: str, key: str) -> Run:
    """Return the oldest run with this key; `made` is deleted if a process elsewhere made one meanwhile.

    The lock excludes processes that share the scratch folder, such as the clones of one work tree.
    """
    same = client.search_runs([made.info.experiment_id], f"tags.`{tag}` = '{key}'")
    first = min([made, *same], key=lambda run: (run.info.start_time, run.info.run_id))
    if first.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
    return first


def _user() -> str:
    with suppress(KeyError, OSError):  # the user of a container may have no name
        return getpass.getuser()
    return "unknown"


def _dataset_input(dataset: Mapping[str, str], context: str) -> DatasetInput:
    """Convert a dataset to MLflow's type, whose digest has at most 36 characters."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    source = json.dumps({"uri": dataset.get("source", dataset["name"])})
    profile = json.dumps({name: value for name, value in sorted(dataset.items()) if name not in ("name", "source")})
    entity = Dataset(dataset["name"], dataset["digest"][:32], "local", source, profile=profile)
    return DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def logged_steps(client: MlflowClient, run: Run) -> dict[str, set[int]]:
    """Return metric name -> steps that the run already contains, without system metrics."""
    names = [name for name in run.data.metrics if not name.startswith("system/")]
    return {name: {point.step for point in client.get_metric_history(run.info.run_id, name)} for name in names}


def logged_images(client: MlflowClient, run_id: str) -> set[tuple[str, int]]:
    """Return (key, step) of the images that the run already contains."""
    pattern = re.compile(r"images/(.+?)\+step\+(\d+)\+timestamp\+.*\.png$")
    matches = (pattern.match(file.path) for file in client.list_artifacts(run_id, "images"))
    return {(match[1], int(match[2])) for match in matches if match}


def points(step: int, values: Mapping[str, float], model_id: str | None = None) -> list[Metric]:
    """Convert the metrics of one step to MLflow's type, linked to the logged model `model_id` if it is not None."""
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [Metric(name, float(value), now, step, model_id=model_id) for name, value in values.items()]


def log_image(client: MlflowClient, run_id: str, key: str, step: int, path: Path) -> None:
    """Log the PNG file at `path` as the image `key` of a step, for the step slider of the UI."""
    from PIL import Image

    with Image.open(path, formats=["PNG"]) as image:
        client.log_image(run_id, image.convert("RGB"), key=key, step=step, synchronous=True)

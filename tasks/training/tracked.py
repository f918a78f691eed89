"""The MLflow run of a training: what the training loop logs to it while it trains."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.params.redaction import redacted
from tasks.runtime import locks, run_labels, tracking, workspace
from tasks.runtime.errors import Preempted

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LOCK = "afterimage.lock"
SYSTEM_METRICS_SECONDS = 5.0
ASYNCHRONOUS = (
    "mlflow.utils.async_logging.async_logging_queue",
    "mlflow.utils.async_logging.async_artifacts_logging_queue",
    "mlflow.system_metrics.system_metrics_monitor",
    "urllib3.connectionpool",
)
"""Loggers of MLflow's threads and of its HTTP client, which report a lost server in long lines, again and again."""


class TrainingRun:
    """What the training loop holds: tells MLflow, never waits for it and never fails because of it.

    What is lost because a server went away in the middle is replayed from `reports/train` by the
    stage `register`.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.run_id: str = run.info.run_id
        self._client = client
        self._steps = tracking.logged_steps(client, run)
        self._images = tracking.logged_images(client, self.run_id)
        self._reachable = True
        for name in ASYNCHRONOUS:
            logging.getLogger(name).addFilter(self._heed)

    def _heed(self, record: logging.LogRecord) -> bool:
        """What a thread of MLflow reports: the server is lost, which is told once; the record itself is not shown."""
        if record.levelno >= logging.ERROR:
            self._lose(record.getMessage())
        return False

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step` as metrics of training, asynchronously; what the run holds already (a resumed run) is
        left out."""
        self.log(step, run_labels.training_metrics({n: value for n, value in values.items() if n != "step"}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The same under the names as they are."""
        fresh = {name: value for name, value in values.items() if step not in self._steps.setdefault(name, set())}
        for name in fresh:
            self._steps[name].add(step)
        if fresh and self._reachable:
            self._client.log_batch(self.run_id, metrics=tracking.points(step, fresh), synchronous=False)

    def image(self, key: str, step: int, path: Path) -> None:
        """Log the picture at `path` as `key` at `step`, unless the run holds it already."""
        if (key, step) not in self._images:
            self._attempt(tracking.log_image, self._client, self.run_id, key, step, path)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy the file `path` to the run's artifacts."""
        self._attempt(self._client.log_artifact, self.run_id, str(path), folder)

    def end(self, status: str) -> None:
        """Send what is still waiting and set the run's status."""
        import mlflow

        self._attempt(mlflow.flush_async_logging)
        self._attempt(self._client.set_terminated, self.run_id, status)
        for name in ASYNCHRONOUS:
            logging.getLogger(name).removeFilter(self._heed)

    def _attempt(self, call: Any, *arguments: Any) -> None:
        from mlflow.exceptions import MlflowException

        if not self._reachable:
            return
        try:
            call(*arguments)
        except (MlflowException, OSError) as error:
            self._lose(str(error))

    def _lose(self, message: str) -> None:
        """Say once that MLflow is lost, and leave it alone from here on."""
        if not self._reachable:
            return
        self._reachable = False
        gone = any(words in message for words in ("Max retries exceeded", "Connection refused", "timed out"))
        reason = "its server does not answer" if gone else redacted(message.splitlines()[0])[:200]
        print(f"\nmlflow: lost ({reason}); training goes on, register replays the rest", file=sys.stderr)


@contextmanager
def training_run(train_key: str, params: Mapping[str, Any], dataset: Mapping[str, str]) -> Iterator[TrainingRun]:
    """The MLflow run of this training, RUNNING for the length of the block; `connect()` comes first.

    Finds the run by `train_key` or creates it. Leaving the block ends the run as FINISHED, as KILLED
    on Ctrl-C or SIGTERM, as FAILED on any other exception. A run whose process was killed outright
    is continued here under the same key, and set to KILLED when a run with another key starts.
    """
    import mlflow

    client = mlflow.MlflowClient()
    run = tracking.find_or_create_run(
        client, tracking.TRAIN_KEY, train_key, kind="training", params=params, dataset=dataset
    )
    lock = workspace.scratch() / "locks" / f"run-{run.info.run_id}.lock"
    with locks.exclusive(lock):
        client.set_tag(run.info.run_id, LOCK, f"{platform.node()}:{lock}")
        client.update_run(run.info.run_id, status="RUNNING")
        _end_orphans(client)
        handle = TrainingRun(client, client.get_run(run.info.run_id))
        status = "FAILED"
        try:
            with _system_metrics(run.info.run_id):
                yield handle
            status = "FINISHED"
        except (KeyboardInterrupt, Preempted):
            status = "KILLED"
            raise
        finally:
            handle.end(status)
    lock.unlink(missing_ok=True)


@contextmanager
def _system_metrics(run_id: str) -> Iterator[None]:
    """Sample CPU, memory, disk, network and, where there is one, GPU into the run."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=SYSTEM_METRICS_SECONDS, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _end_orphans(client: MlflowClient) -> None:
    """Set to KILLED the runs of this machine that say RUNNING although nobody holds their lock."""
    unfinished = f"attributes.status = 'RUNNING' and tags.`{tracking.KIND}` = 'training'"
    running = client.search_runs([tracking.experiment_id(client)], unfinished)
    for run in running:
        host, _, lock = run.data.tags.get(LOCK, "").partition(":")
        if lock and host == platform.node() and not locks.is_held(Path(lock)):
            client.set_terminated(run.info.run_id, "KILLED")

"""The MLflow run of a training: metrics and images that the training loop logs."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
    "mlflow.utils.rest_utils",
    "urllib3.connectionpool",
)
"""Loggers of MLflow's threads and of its HTTP client; they repeat long messages about a lost server."""


class TrainingRun:
    """Handle of the training loop on its MLflow run: logging neither waits for MLflow nor raises its errors.

    If the server is lost, the stage `register` replays the missing points from `reports/train`, which has no durations:
    of the speed and the memory, those points are lost.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.run_id: str = run.info.run_id
        self._client = client
        self._steps = tracking.logged_steps(client, run)
        self._images = tracking.logged_images(client, self.run_id)
        self._reachable = True
        for name in ASYNCHRONOUS:
            logging.getLogger(name).addFilter(self._filter)

    def _filter(self, record: logging.LogRecord) -> bool:
        """Suppress messages of MLflow's threads; an error means that the server is lost."""
        if record.levelno >= logging.ERROR:
            self._lose(record.getMessage())
        return False

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step` asynchronously as metrics of training; a resumed run skips points that it has."""
        self.log(step, run_labels.training_metrics({n: value for n, value in values.items() if n != "step"}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step` asynchronously under their own names."""
        fresh = {name: value for name, value in values.items() if step not in self._steps.setdefault(name, set())}
        for name in fresh:
            self._steps[name].add(step)
        if fresh and self._reachable:
            self._client.log_batch(self.run_id, metrics=tracking.points(step, fresh), synchronous=False)

    def image(self, key: str, step: int, path: Path) -> None:
        """Log the PNG file at `path` as the image `key` at `step`, unless the run has it."""
        if (key, step) not in self._images:
            self._attempt(tracking.log_image, self._client, self.run_id, key, step, path)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy the file `path` to the run's artifacts."""
        self._attempt(self._client.log_artifact, self.run_id, str(path), folder)

    def end(self, status: str) -> None:
        """Flush queued metrics and set the status of the run."""
        import mlflow

        self._attempt(mlflow.flush_async_logging)
        self._attempt(self._client.set_terminated, self.run_id, status)
        if self._reachable:  # otherwise MLflow's threads go on failing until the process ends
            for name in ASYNCHRONOUS:
                logging.getLogger(name).removeFilter(self._filter)

    def _attempt(self, call: Callable[..., object], *arguments: object) -> None:
        from mlflow.exceptions import MlflowException

        if not self._reachable:
            return
        try:
            call(*arguments)
        except (MlflowException, OSError) as error:
            self._lose(str(error))

    def _lose(self, message: str) -> None:
        """Report once that MLflow is lost, and stop logging."""
        if not self._reachable:
            return
        self._reachable = False
        gone = any(words in message for words in ("Max retries exceeded", "Connection refused", "timed out"))
        reason = "its server does not answer" if gone else redacted(message.splitlines()[0])[:200]
        rest = "register replays the rest, except the curves of speed and memory"
        print(f"\nmlflow: lost ({reason}); training continues, {rest}", file=sys.stderr)


@contextmanager
def training_run(train_key: str, params: Mapping[str, object], dataset: Mapping[str, str]) -> Iterator[TrainingRun]:
    """Find or create the MLflow run of this training; it has the status RUNNING inside the block.

    After the block it is FINISHED, after Ctrl-C or SIGTERM KILLED, after any other exception FAILED. A run whose
    process was killed with SIGKILL is continued under the same key, or becomes KILLED when another key starts.
    `tracking.connect()` must be called before.
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
    """Log CPU, memory, disk, network and GPU metrics to the run inside the block."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, sampling_interval=SYSTEM_METRICS_SECONDS, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _end_orphans(client: MlflowClient) -> None:
    """Set runs of this machine to KILLED if their status is RUNNING but no process holds their lock."""
    unfinished = f"attributes.status = 'RUNNING' and tags.`{tracking.KIND}` = 'training'"
    running = client.search_runs([tracking.experiment_id(client)], unfinished)
    for run in running:
        host, _, lock = run.data.tags.get(LOCK, "").partition(":")
        if lock and host == platform.node() and not locks.is_held(Path(lock)):
            client.set_terminated(run.info.run_id, "KILLED")

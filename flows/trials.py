"""A sweep as a Prefect flow: one task run per trial, each in a clone of its own that shares the DVC cache.

`python -m flows.sweep NAME` runs it here; the deployment `sweep` of `prefect.yaml` runs it on the worker. The stages
before `train` run once for all trials that share their parameters. A trial whose evaluations MLflow has, by the key of
`tasks/sweeps/identity.py`, is not run again, so that an interrupted sweep continues.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import cancelling, clone, devices, experiments, repro, stages
from flows.place import Place, environment
from tasks.params.redaction import redacted
from tasks.runtime import tracking
from tasks.runtime import workspace as places
from tasks.runtime.errors import StageError
from tasks.sweeps import identity, leaderboard, plan, records, search, spec
from tasks.sweeps.spec import SweepError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
    from optuna.study import Study
    from prefect import Task

    from tasks.sweeps.identity import Stages
    from tasks.sweeps.plan import Evaluation, Trial
    from tasks.sweeps.spec import Spec

Log = Callable[[str], None]
JOBS = max(1, min(2, (os.cpu_count() or 1)))
RETRIES, RETRY_SECONDS = 1, 5
WAIT_SECONDS = 3600.0
PAGES = Path("reports") / "sweeps"
STUDIES = Path(".prefect") / "studies"
INTERRUPTED = "the sweep was interrupted; the same command continues it"

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[tuple(spec.names() or [""])]  # Prefect's form makes a drop-down of it


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common."""

    root: Path
    """The main work tree."""
    sweep: str
    """Name of the sweep with its overrides; prefix of its experiments."""
    spec: Spec
    stages: Stages
    environment: dict[str, str]
    client: MlflowClient
    parent: Run
    stop: threading.Event
    """Set when the flow is interrupted or cancelled: no further trial starts."""
    upstream: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """`identity.upstream_key` -> checksums of the outputs of these stages."""
    code: dict[str, str] = field(default_factory=dict)
    """Path -> Git id, see `identity.code_ids`."""
    preparing: threading.Lock = field(default_factory=threading.Lock)

    def key(self, evaluation: Evaluation) -> str:
        """Content key of an evaluation whose upstream stages are prepared."""
        upstream = self.upstream[identity.upstream_key(self.stages, evaluation.document)]
        return identity.evaluation_key(self.stages, evaluation.document, upstream, self.code)


@flow(name="afterimage-sweep", flow_run_name="sweep {name}")
def sweep(name: Name, jobs: int = JOBS, retries: int = RETRIES, overrides: list[str] | None = None) -> State[None]:
    """Train and compare every trial of `sweeps/NAME.yaml`.

    Args:
        name: The sweep.
        jobs: Trials that run at the same time; with GPUs, as many as there are GPUs, at most.
        retries: How often a trial that failed or was killed is started again.
        overrides: Parameters of all trials that differ from the file, one `section.key=value` each.
    """
    with cancelling.obeyed(UUID(flow_run.id)) as cancelled:
        try:
            state = _sweep(name, max(1, jobs), retries, overrides or [], cancelled)
        except (StageError, SweepError) as error:
            state = Failed(message=redacted(str(error)))
    return Cancelled(message="ended by the run itself") if cancelled.is_set() else state


def _sweep(name: str, jobs: int, retries: int, overrides: list[str], stop: threading.Event) -> State[None]:
    description = spec.load(name)
    plan.validate(description, overrides)
    log, root = get_run_logger().info, places.root()
    with clone.only_run(root / clone.CLONES / f"sweep-{name}", f"flow run {flow_run.name}", 0, log):
        shared = _shared(root, name, description, jobs, overrides, stop)
        try:
            if description.search is None:
                todo = plan.trials(description, overrides)
                _prepare_all(shared, todo)
                _run_all(shared, todo, jobs, retries)
                evaluations = [evaluation for trial in todo for evaluation in trial.evaluations]
            else:
                evaluations = _search(shared, overrides, jobs, retries)
            return _conclude(shared, name, evaluations)
        except BaseException:  # also a cancelled flow or Ctrl-C: the parent run must not stay RUNNING
            shared.client.set_terminated(shared.parent.info.run_id, "FAILED")
            raise


def _shared(
    root: Path, name: str, description: Spec, jobs: int, overrides: Sequence[str], stop: threading.Event
) -> Shared:
    client = tracking.connect()
    variables = environment()
    # Trials share the cores; more threads than cores would slow all of them down.
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    sweep = name
    if overrides:
        sweep += f"-{hashlib.sha256(' '.join(sorted(overrides)).encode()).hexdigest()[:6]}"
    parent = records.parent(client, sweep, name, description, overrides)
    parts = identity.stages(root, repro.graph(root))
    code = identity.code_ids(root, parts)
    return Shared(root, sweep, description, parts, variables, client, parent, stop, code=code)


def _prepare_all(shared: Shared, trials: Sequence[Trial]) -> None:
    """Run the stages before `train` once for each combination of their parameters. Raises `StageError`."""
    for trial in trials:
        _prepare_for(shared, trial)


def _prepare_for(shared: Shared, trial: Trial) -> None:
    first = trial.evaluations[0]
    with shared.preparing:
        key = identity.upstream_key(shared.stages, first.document)
        if key not in shared.upstream:
            work = partial(_prepare, shared, first, key)
            state = run_trial.with_options(task_run_name="upstream stages")("upstream stages", work, return_state=True)
            if not state.is_completed():
                raise StageError(state.message or "the stages before the training failed")


def _prepare(shared: Shared, evaluation: Evaluation, key: str, log: Log) -> str:
    folder = clone.folder(shared.root, f"sweep-{key[:16]}-upstream")
    with clone.only_run(folder, f"flow run {flow_run.name}", WAIT_SECONDS, log) as held:
        clone.update(shared.root, folder, shared.spec.preset, evaluation.overrides, log)
        with devices.lent(shared.environment, log, shared.stop) as variables:
            ran = repro.repro_with_upstream(
                shared.stages.upstream, folder, variables, log, held=held, wait_seconds=WAIT_SECONDS, stop=shared.stop
            )
        shared.upstream[key] = identity.outputs(folder / "dvc.lock", shared.stages)
        shutil.rmtree(folder)
    return f"ran {', '.join(sorted(ran)) or 'nothing, all stages cached'}"


@task(task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False)
def run_trial(label: str, work: Callable[[Log], str]) -> State[None]:  # noqa: ARG001 - the name of the task run
    """Run `work` with a logger; the state is Completed or Failed, with one sentence."""
    log = stages.run_log()
    try:
        return Completed(message=work(log))
    except StageError as error:
        get_run_logger().error(redacted(str(error)))
        return Failed(message=redacted(str(error)))


def _run_all(shared: Shared, trials: Sequence[Trial], jobs: int, retries: int) -> None:
    """Run the trials without results, `jobs` at a time; one that fails does not end the others."""
    todo = [trial for trial in trials if not _is_finished(shared, trial)]
    get_run_logger().info(f"{len(trials) - len(todo)} of {len(trials)} trials finished before")
    configured = run_trial.with_options(retries=retries, retry_delay_seconds=RETRY_SECONDS)
    _run_bounded(shared, [(trial.label, partial(perform, shared, trial)) for trial in todo], jobs, configured)


def _run_bounded(
    shared: Shared, works: Sequence[tuple[str, Callable[[Log], str]]], jobs: int, configured: Task[..., State[None]]
) -> None:
    """Run each (label, work) as a task run, `jobs` at a time, and wait for all of them."""
    with cancelling.interrupting(shared.stop) as interrupt, ThreadPoolTaskRunner(max_workers=jobs) as runner:
        try:
            wait([runner.submit(configured, {"label": label, "work": work}) for label, work in works])
        except BaseException:  # Ctrl-C, or the worker cancels the flow; leaving the runner waits for its threads
            interrupt()
            raise


def _search(shared: Shared, overrides: Sequence[str], jobs: int, retries: int) -> list[Evaluation]:
    """Try points that Optuna proposes, `jobs` at a time; returns the evaluations of all points of the study."""
    description = shared.spec
    assert description.search is not None
    study = search.open_study(shared.root / STUDIES / f"{shared.sweep}.log", description, overrides)
    remaining = max(0, description.search.trials - search.done(study))
    get_run_logger().info(f"{description.search.trials - remaining} of {description.search.trials} points tried before")
    attempt = partial(_try_point, shared, study, overrides, retries)
    _run_bounded(
        shared, [(f"point {number + 1} of {remaining}", attempt) for number in range(remaining)], jobs, run_trial
    )
    found: list[Evaluation] = []
    for settings, complete in search.points(study):
        for seed in description.seeds:
            trial = plan.trial(description, settings, seed, overrides)
            _prepare_for(shared, trial)
            if complete or _is_finished(shared, trial):
                found += trial.evaluations
    return found


def _try_point(shared: Shared, study: Study, overrides: Sequence[str], retries: int, log: Log) -> str:
    """Train the next point with one seed after the other, until the pruner stops it."""
    if shared.stop.is_set():
        raise StageError(INTERRUPTED)
    point, values = search.ask(study, shared.spec), []
    seeds, metric = shared.spec.seeds, shared.spec.metrics[0]
    configured = run_trial.with_options(retries=retries, retry_delay_seconds=RETRY_SECONDS)
    for count, seed in enumerate(seeds, 1):
        trial = plan.trial(shared.spec, point.settings, seed, overrides)
        _prepare_for(shared, trial)
        if not _is_finished(shared, trial):
            state = configured(trial.label, partial(perform, shared, trial), return_state=True)
            if shared.stop.is_set():
                raise StageError(INTERRUPTED)  # the trial stays RUNNING in the study, so that it is tried again
        result = records.finished(shared.client, shared.key(trial.evaluations[0]), shared.sweep)
        if result is None or metric not in result.metrics:
            search.fail(study, point)
            raise StageError(f"{trial.label} has no {metric}: {state.message if result is None else 'not measured'}")
        values.append(result.metrics[metric])
        mean = sum(values) / count
        if search.report(study, point, mean, count, last=count == len(seeds)):
            break
    log(f"{plan.words(point.settings)}: {metric} {mean:.4g} after {count} of {len(seeds)} seeds")
    return f"{plan.words(point.settings)}: {mean:.4g}"


def _is_finished(shared: Shared, trial: Trial) -> bool:
    return all(records.finished(shared.client, shared.key(each), shared.sweep) for each in trial.evaluations)


def perform(shared: Shared, trial: Trial, log: Log) -> str:
    """Train one trial in a clone of its own and make its evaluations; returns the result in words.

    Raises `StageError` if a stage fails or is killed; the clone is then kept, and the next attempt continues from the
    last checkpoint.
    """
    if shared.stop.is_set():
        raise StageError(INTERRUPTED)
    short = shared.key(trial.evaluations[0])[:16]
    folder, scratch = clone.folder(shared.root, f"sweep-{short}"), places.scratch() / "sweeps" / short
    # One scratch folder allows one training at a time; the checkpoints of a killed trial wait in its own.
    variables = {**shared.environment, "AFTERIMAGE_SCRATCH": str(scratch)}
    found: list[str] = []
    with clone.only_run(folder, f"trial {trial.label}", WAIT_SECONDS, log) as held:
        clone.update(shared.root, folder, None, (), log)
        for evaluation in trial.evaluations:
            if records.finished(shared.client, shared.key(evaluation), shared.sweep):
                continue
            clone.compose(folder, shared.spec.preset, evaluation.overrides)
            found.append(_evaluate(shared, evaluation, Place(folder, variables, held, WAIT_SECONDS), log))
        shutil.rmtree(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    return "; ".join(found)


def _evaluate(shared: Shared, evaluation: Evaluation, place: Place, log: Log) -> str:
    """Bring `evaluate` and all before it up to date, and record the results in MLflow and as a DVC experiment."""
    run = records.begin(shared.client, shared.parent, evaluation, shared.key(evaluation))
    began = time.monotonic()
    name = f"{shared.sweep}-{evaluation.slug}"
    try:
        with devices.lent(place.environment, log, shared.stop) as variables:
            repro.repro_with_upstream(
                [identity.TARGET],
                place.folder,
                variables,
                log,
                held=place.held,
                wait_seconds=place.wait_seconds,
                stop=shared.stop,
            )
        experiments.save(shared.root, place.folder, name, identity.TARGET, place.environment)
        records.finish(shared.client, run, place.folder, name, time.monotonic() - began)
    except BaseException as error:
        records.fail(shared.client, run, redacted(str(error)) or type(error).__name__)
        raise
    metric = shared.spec.metrics[0]
    value = records.result(shared.client, run).metrics.get(metric)
    return f"{evaluation.label}: {metric} {'not measured' if value is None else f'{value:.4g}'}"


def _conclude(shared: Shared, name: str, evaluations: Sequence[Evaluation]) -> State[None]:
    """Publish the leaderboard and the page of comparison; the state is Failed if a trial has no result."""
    found, missing = [], []
    for evaluation in evaluations:
        result = records.finished(shared.client, shared.key(evaluation), shared.sweep)
        if result is None:
            missing.append(evaluation.label)
        else:
            found.append(result)
    board = leaderboard.board(
        found, shared.spec.metrics, list(dict.fromkeys(each.case for each in evaluations)), missing
    )
    text = leaderboard.markdown(board)
    create_table_artifact(leaderboard.table(board), key="leaderboard", description=shared.spec.title)
    create_markdown_artifact(text, key="sweep", description=shared.spec.question)
    records.publish(shared.client, shared.parent, board.to_json(), text, complete=not missing)
    print(text)
    page = _page(shared, name, board)
    if missing:
        return Failed(message=f"{len(missing)} of {len(evaluations)} evaluations have no result: {'; '.join(missing)}")
    best = f"best: {board.rows[0].case}" if board.rows and not board.refusal else board.refusal
    return Completed(message=f"{best}; {len(evaluations)} evaluations{f'; {page}' if page else ''}")


def _page(shared: Shared, name: str, board: leaderboard.Board) -> str:
    """Write the page that compares the first seed of every combination; returns its path, or "" without results."""
    runs = [run for row in board.rows if (run := row.runs.get(shared.spec.seeds[0]))]
    if not runs:
        return ""
    path = shared.root / PAGES / f"{name}.html"
    command = [sys.executable, "-m", "tasks.compare", *runs, "--out", str(path), "--sweep", shared.parent.info.run_id]
    done = subprocess.run(command, cwd=shared.root, env=shared.environment, capture_output=True, text=True, check=False)
    if done.returncode:
        get_run_logger().warning(f"no page of comparison: {' '.join(done.stderr.split())[-500:]}")
        return ""
    with suppress(OSError):
        shared.client.log_artifact(shared.parent.info.run_id, str(path))
    return str(path.relative_to(shared.root))

"""Executors that run functions on a Ray cluster, for `distributor: ray` of a stage.

A stage joins a running cluster, or starts one on its machine that ends with it. Arguments and results pass through
Ray's object store, so the workers need no folder in common with the stage. A call whose worker dies runs again on
another worker; the other calls are not affected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

from tasks.runtime.errors import StageError

Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "RAY_ADDRESS"
"""Variable with the address of a running cluster."""
LOOPBACK = ("127.0.0.1", "localhost")
STARTS = 3
RETRIES = 3
"""How often a call runs again after its worker died; a call that kills every worker must not run for ever."""
STORE_BYTES = 512 << 20
"""Object store of a cluster that a stage starts: more than the chunks that a stage has in flight."""


@contextmanager
def joined(address: str | None, workers: int, section: str) -> Iterator[Any]:  # the module ray, which has no types
    """Join the cluster at `address`, or at `RAY_ADDRESS`, or start one of `workers` CPUs; yields the module `ray`.

    `section` is that of the parameter `distributor`, for messages. A cluster that is started listens on the loopback
    interface only.

    Raises:
        StageError: if Ray is not installed, if the cluster cannot be joined, or if the workers of a call die.
    """
    address = address or os.environ.get(ADDRESS)
    _prepare_environment(address)
    ray = _imported(section)
    _begin(ray, address, workers, section)
    try:
        yield ray
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise StageError(
            f"a worker of the Ray cluster died {RETRIES + 1} times in the same call, probably for lack of memory "
            f"({type(error).__name__}); lower {section}.workers, or give the cluster more memory"
        ) from None
    finally:
        ray.shutdown()


def _begin(ray: Any, address: str | None, workers: int, section: str) -> None:  # the module, which has no types
    """Join the cluster at `address`, or start one; on a busy machine Ray gives up after 30 s, so it has `STARTS`."""
    for start in range(1, STARTS + 1):
        try:
            _initialise(ray, address, workers)
        except Exception as error:  # Ray raises `Exception` itself if its processes do not start in time
            ray.shutdown()
            if address or start == STARTS:
                raise StageError(
                    f"the Ray cluster {address or 'on this machine'} cannot be used ({error}); correct "
                    f"{section}.ray_address or {ADDRESS}, or set {section}.distributor to 'local'"
                ) from None
        else:
            return


def _initialise(ray: Any, address: str | None, workers: int) -> None:  # the module, which has no types
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        packages = [str(ROOT / name) for name in ("models", "tasks")]
        ray.init(address=address, runtime_env={"py_modules": packages, "excludes": ["__pycache__"]}, **quiet)
        return
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=workers,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        **quiet,
    )


def _prepare_environment(address: str | None) -> None:
    """Set what Ray reads when it is imported: no telemetry, the loopback interface, and the secret of a cluster.

    Ray protects every cluster that it starts by a token, but presents it to a running one only in the mode `token`. It
    replaces a loopback address by that of the machine in its network, except where it takes clusters to be impossible.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None or address.partition(":")[0] in LOOPBACK:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address and ("RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _imported(section: str) -> Any:  # the module ray, which has no types
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise StageError(
            f"{section}.distributor 'ray' needs the package ray; run 'make install EXTRA=ray', or set it to 'local'"
        ) from None
    return ray


class Tasks(Executor):
    """Runs functions without state; each call takes one CPU of the cluster."""

    def __init__(self, ray: Any) -> None:  # the module, which has no types
        self._ray = ray
        self._remote: dict[Callable[..., Any], Any] = {}  # Ray exports a function to the workers once

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        if fn not in self._remote:
            self._remote[fn] = self._ray.remote(num_cpus=1, max_retries=RETRIES)(fn)
        return self._remote[fn].remote(*args, **kwargs).future()


@dataclass(frozen=True)
class Allotment:
    """What `Actors` take of a cluster."""

    actors: int
    cpus: int
    """Of each actor: one, or with GPUs its share of the cluster's."""
    gpus: int
    """Of each actor."""


def allotted(ray: Any, workers: int) -> Allotment:  # the module, which has no types
    """Return the actors for at most `workers` processes; if the cluster has GPUs, each takes one of them."""
    found = ray.cluster_resources()
    gpus, cpus = int(found.get("GPU", 0)), int(found.get("CPU", 1))
    return Allotment(min(workers, gpus), max(1, cpus // gpus), 1) if gpus else Allotment(workers, 1, 0)


class Actors(Executor):
    """Runs functions of a state, such as a network, that each process of `allotment` builds once.

    `make(*arguments)` returns the state, in each process; the processes take the calls in turn. A process with a GPU
    runs two calls at once, so that it can prepare one while its GPU computes the other.
    """

    def __init__(self, ray: Any, allotment: Allotment, make: Callable[..., Any], *arguments: Any) -> None:
        actor = ray.remote(
            num_cpus=allotment.cpus,
            num_gpus=allotment.gpus,
            max_concurrency=1 + (allotment.gpus > 0),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )(_Actor)
        shared = [ray.put(argument) for argument in arguments]  # sent to each machine once
        self.count = allotment.actors
        self._turns = cycle([actor.remote(make, *shared) for _ in range(self.count)])

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future: Future[Result] = next(self._turns).run.remote(fn, *args, **kwargs).future()
        return future

    def each(self, fn: Callable[..., Result], *args: Any) -> list[Result]:
        """Run a function once in every process."""
        return [future.result() for future in [self.submit(fn, *args) for _ in range(self.count)]]


class _Actor:
    """A process of `Actors`."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self.state = make(*arguments)

    def run(self, fn: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        return fn(self.state, *args, **kwargs)

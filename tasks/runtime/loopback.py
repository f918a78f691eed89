"""Connections to this machine never go through a proxy.

MLflow, Prefect and their clients listen on 127.0.0.1, but HTTP clients send requests to it through `http_proxy`, too,
unless `no_proxy` lists it. `exempt` adds that to the environment of every process that this project starts.
"""

from __future__ import annotations

from collections.abc import MutableMapping

HOSTS = ("localhost", "127.0.0.1", "::1")
_NAMES = ("no_proxy", "NO_PROXY")


def exempt(environment: MutableMapping[str, str]) -> None:
    """Add the loopback hosts to `no_proxy` and `NO_PROXY`; what they list already stays. Idempotent."""
    given = {name: environment[name] for name in _NAMES if environment.get(name)}
    for name in _NAMES:
        listed = [host.strip() for host in given.get(name, next(iter(given.values()), "")).split(",") if host.strip()]
        missing = [] if "*" in listed else [host for host in HOSTS if host not in listed]  # '*' exempts every host
        environment[name] = ",".join([*listed, *missing])

"""Exemption of this machine from HTTP proxies.

MLflow and Prefect listen on 127.0.0.1. HTTP clients send even such requests through `http_proxy`, unless `no_proxy`
lists the host. Every process of this project calls `exempt` for itself or for the processes that it starts.
"""

from __future__ import annotations

from collections.abc import MutableMapping

HOSTS = ("localhost", "127.0.0.1", "::1")
_NAMES = ("no_proxy", "NO_PROXY")


def exempt(environment: MutableMapping[str, str]) -> None:
    """Add the loopback hosts to `no_proxy` and `NO_PROXY`; hosts that they already list are kept. Idempotent."""
    present = {name: environment[name] for name in _NAMES if environment.get(name)}
    for name in _NAMES:
        listed = [
            host.strip() for host in present.get(name, next(iter(present.values()), "")).split(",") if host.strip()
        ]
        missing = [] if "*" in listed else [host for host in HOSTS if host not in listed]  # '*' exempts every host
        environment[name] = ",".join([*listed, *missing])

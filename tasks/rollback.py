"""Restore the previous champion, or show who was champion when.

    python -m tasks.rollback [--to VERSION] [--reason TEXT]
    python -m tasks.rollback --history [--at 2026-11-26T12:00:00Z] [--json]

A rollback takes back the last promotion. The version that it replaces is not promoted again by the gates, until
`--to` makes it champion by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tasks.params import ParamsError, load
from tasks.params.redaction import redacted
from tasks.runtime import locks, tracking, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

    from tasks.registration.champions import Reign


def main() -> None:
    """Parse the command line; roll back or print the history."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.rollback", description="Restore the previous champion, or show who was champion when."
    )
    parser.add_argument("--name", help="registered model (default: register.model_name of params.yaml)")
    parser.add_argument("--to", type=int, metavar="VERSION", help="make this version champion, not the previous one")
    parser.add_argument("--reason", default="no reason given", metavar="TEXT", help="stored with both versions")
    parser.add_argument("--history", action="store_true", help="print all champions and change nothing")
    parser.add_argument(
        "--at",
        metavar="TIME",
        help="with --history: only the champion at this time (ISO 8601; UTC unless it names an offset)",
    )
    parser.add_argument("--json", action="store_true", help="with --history: print JSON")
    given = parser.parse_args()
    if not given.history and (given.at or given.json):
        parser.error("--at and --json need --history")
    if given.history and given.to is not None:
        parser.error("--history changes nothing; leave out --to, or --history")
    try:
        name = given.name or load().register_.model_name
        if given.history:
            _print(*reigns(name, given.at), as_json=given.json)
        else:
            print(f"rollback: {rollback(name, given.to, given.reason)}")
    except (StageError, ParamsError) as error:
        sys.exit(f"rollback: error: {redacted(str(error))}")


def rollback(name: str, to: int | None = None, reason: str = "no reason given") -> str:
    """Make the previous champion, or version `to`, the champion of the registered model `name`; returns a sentence.

    Raises:
        StageError: if there is no champion, no previous one, or no such version.
    """
    from tasks.registration import champions

    client = tracking.connect()
    with locks.exclusive(workspace.scratch() / "locks" / "register.lock"):
        model = _model(client, name)
        holder = champions.current(model)
        target = to if to is not None else champions.previous(champions.history(model.tags))
        if target is None:
            raise StageError(f"{name} has had no champion before; name a version: --to VERSION")
        if target == holder:
            raise StageError(f"version {target} of {name} is the champion already")
        restored = _version(client, name, target)
        if champions.WITHDRAWN in restored.tags:
            client.delete_model_version_tag(name, restored.version, champions.WITHDRAWN)
        if holder is not None:
            champions.withdraw(client, _version(client, name, holder), f"version {target} restored, {reason}")
        champions.set_champion(client, restored, f"restored by a rollback: {reason}", rolled_back=True)
    return f"version {target} of {name} is champion again" + (f", in place of version {holder}" if holder else "")


def reigns(name: str, moment: str | None = None) -> tuple[list[Reign], int | None]:
    """Return the champions of a registered model and the present alias, or only the champion at a moment, and None.

    Raises:
        StageError: if MLflow has no such model, or it had no champion at that moment, or that is no time.
    """
    from tasks.registration import champions

    model = _model(tracking.connect(), name)
    found = champions.history(model.tags)
    if moment is not None:
        one = champions.at(found, moment)
        if one is None:
            raise StageError(f"{name} had no champion at {moment}")
        return [one], None
    return found, champions.current(model)


def _model(client: MlflowClient, name: str) -> RegisteredModel:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException:
        raise StageError(f"MLflow has no registered model {name}; 'make ui' lists them") from None


def _version(client: MlflowClient, name: str, number: int) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(number))
    except MlflowException:
        raise StageError(f"version {number} of {name} does not exist; name another: --to VERSION") from None


def _print(found: Sequence[Reign], alias: int | None, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([vars(reign) for reign in found], indent=2))
        return
    print(f"{'since (UTC)':<22}{'version':<9}reason")
    for reign in found:
        print(f"{reign.since:<22}{reign.version:<9}{reign.reason}")
    if alias is not None and (not found or found[-1].version != alias):
        print(f"rollback: the alias champion is at version {alias}", file=sys.stderr)


if __name__ == "__main__":
    main()

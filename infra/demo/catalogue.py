"""The models that the page offers: the one of this work tree, and those in the MLflow registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.drawing import place
from tasks.drawing.options import MODEL
from tasks.runtime import store, tracking, workspace
from tasks.runtime.errors import StageError


@dataclass(frozen=True)
class Entry:
    """A model of the list."""

    title: str
    name: str
    """What `--model` of `python -m tasks.draw` takes."""


def entries(first: str | None) -> list[Entry]:
    """Return the model `first` if one is named, that of the work tree, and the registered versions, newest first.

    Raises:
        StageError: if there is none.
    """
    found = [Entry(first, first)] if first else []
    if Path(MODEL).is_dir():
        found.append(Entry(f"{MODEL} (this work tree)", MODEL))
    try:
        found += registered()
    except StageError as error:
        print(f"demo: registered models are not listed: {error}", flush=True)
    if not found:
        place.find(MODEL)  # raises the sentence of the command
    return [entry for index, entry in enumerate(found) if entry.name not in {other.name for other in found[:index]}]


def registered() -> list[Entry]:
    """Return the aliases and versions of the models that this project registered.

    Raises:
        StageError: if the MLflow server does not answer, or the database is of another version.
    """
    uri = workspace.tracking_uri()
    if uri.startswith(store.SQLITE) and not Path(uri.removeprefix(store.SQLITE)).exists():
        return []  # connecting would create it
    client = tracking.connect()
    found = []
    for model in client.search_registered_models(order_by=["name"]):
        versions = [
            version
            for version in client.search_model_versions(f"name = '{model.name}'", order_by=["version_number DESC"])
            if place.LOGGED_MODEL in version.tags
        ]
        numbers = {int(version.version) for version in versions}
        aliases = {alias: int(number) for alias, number in sorted(model.aliases.items()) if int(number) in numbers}
        found += [
            Entry(f"{model.name}@{alias} (version {number})", f"{place.REGISTERED}{model.name}@{alias}")
            for alias, number in aliases.items()
        ]
        found += [
            Entry(f"{model.name}, version {version.version}", f"{place.REGISTERED}{model.name}/{version.version}")
            for version in versions
        ]
    return found

"""Who is and was champion: the alias in MLflow, and its history as tags of the registered model.

MLflow keeps no history of an alias. Each change is one tag `afterimage.champion.0001`, `afterimage.champion.0002` and
so on, a JSON object with the version, the time and the reason. The tag is written before the alias moves: after a crash
between the two, the next decision for the same version only moves the alias.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tasks.registration import announce
from tasks.runtime.errors import StageError
from tasks.runtime.tracking import CHAMPION, PROMOTION

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

TAG = "afterimage.champion."
NAME = re.compile(re.escape(TAG) + r"(\d{4,})")
WITHDRAWN = "afterimage.withdrawn"
"""Tag of a version that a rollback replaced, which no gate promotes again: time and reason."""
BEFORE = "champion when the history began"
REASON_CHARACTERS = 1000
"""Of a reason in a tag; MLflow limits the value to 5,000 characters."""


@dataclass(frozen=True)
class Reign:
    """The time of one champion, until the start of the next one."""

    version: int
    since: str
    """Start in UTC, ISO 8601 with seconds."""
    reason: str
    rolled_back: bool = False
    """Whether a rollback, and not a promotion, made it champion."""


def current(model: RegisteredModel) -> int | None:
    """Return the champion's version number, or None."""
    # The SQL stores give version numbers as int here and str there.
    number = model.aliases.get(CHAMPION)
    return None if number is None else int(number)


def history(tags: Mapping[str, str]) -> list[Reign]:
    """Return all champions in their order, from the tags of a registered model."""
    numbered = sorted((int(match[1]), value) for name, value in tags.items() if (match := NAME.fullmatch(name)))
    return [Reign(**json.loads(value)) for _, value in numbered]


def at(reigns: Sequence[Reign], moment: str) -> Reign | None:
    """Return the champion at a moment (ISO 8601; UTC unless it names an offset), or None if there was none yet.

    Raises:
        StageError: if `moment` is no such time.
    """
    when = _moment(moment)
    until = [reign for reign in reigns if _moment(reign.since) <= when]
    return until[-1] if until else None


def _moment(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise StageError(f"{text!r} is no time; write it as 2026-11-26T12:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def previous(reigns: Sequence[Reign]) -> int | None:
    """Return the version that a rollback restores.

    A rollback takes back one promotion, so that a second one restores the champion before that, and not the version
    that the first one replaced.
    """
    stack: list[int] = []
    for reign in reigns:
        if reign.rolled_back and reign.version in stack:
            while stack[-1] != reign.version:
                stack.pop()
        elif not stack or stack[-1] != reign.version:
            stack.append(reign.version)
    return stack[-2] if len(stack) > 1 else None


def set_champion(
    client: MlflowClient, version: ModelVersion, reason: str, *, rolled_back: bool = False, now: str | None = None
) -> None:
    """Make `version` the champion, record it, also as the reason on the version, and announce it to the webhook.

    The caller holds the lock. `now` is the time to record, by default the present.
    """
    model = client.get_registered_model(version.name)
    reigns = history(model.tags)
    holder = current(model)
    if not reigns and holder not in (None, int(version.version)):
        began = client.get_model_version(version.name, str(holder)).creation_timestamp / 1000
        reigns.append(_record(client, version.name, 1, Reign(int(str(holder)), _iso(began), BEFORE)))
    if not reigns or reigns[-1].version != int(version.version):
        reign = Reign(int(version.version), now or _iso(), reason[:REASON_CHARACTERS], rolled_back)
        _record(client, version.name, len(reigns) + 1, reign)
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    if version.tags.get(PROMOTION) != reason:
        client.set_model_version_tag(version.name, version.version, PROMOTION, reason)
    if holder != int(version.version):
        announce.champion(version.name, int(version.version), reason, before=holder, rolled_back=rolled_back)


def _record(client: MlflowClient, name: str, number: int, reign: Reign) -> Reign:
    client.set_registered_model_tag(name, f"{TAG}{number:04d}", json.dumps(vars(reign), sort_keys=True))
    return reign


def _iso(seconds: float | None = None) -> str:
    """Return a time, by default now, in UTC and to the second."""
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def withdraw(client: MlflowClient, version: ModelVersion, reason: str) -> None:
    """Keep the gates from promoting a version again."""
    client.set_model_version_tag(version.name, version.version, WITHDRAWN, f"{_iso()}: {reason}"[:REASON_CHARACTERS])


def why_withdrawn(version: ModelVersion) -> str | None:
    """Return why a version must not become champion again; None if no rollback replaced it."""
    found = version.tags.get(WITHDRAWN)
    if found is None:
        return None
    return f"withdrawn by a rollback ({found}); 'python -m tasks.rollback --to {version.version}' makes it champion"

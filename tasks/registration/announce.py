"""Announce a new champion to the webhook of `AFTERIMAGE_WEBHOOK_URL`.

The same address gets the notifications about flow runs (`flows/notifications.py`). Its path is often a secret, so
messages name the host only.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request

from tasks.runtime import workspace
from tasks.runtime.errors import StageError

SECONDS = 10.0


def champion(name: str, version: int, reason: str, *, before: int | None, rolled_back: bool) -> None:
    """Post the change of the champion of the registered model `name` as JSON; prints a warning if that fails.

    Args:
        name: Registered model.
        version: The new champion.
        reason: Why it was promoted or restored.
        before: The version that it replaces, or None.
        rolled_back: Whether a rollback restored it.
    """
    event = "rolled-back" if rolled_back else "promoted"
    instead = f" in place of version {before}" if before is not None else ""
    body = {
        "event": event,
        "text": f"{name} version {version} is champion{instead}: {reason}",
        "model": name,
        "version": version,
        "replaces": before,
        "reason": reason,
    }
    try:
        _post(body)
    except (StageError, OSError, ValueError, http.client.HTTPException) as error:
        # The champion has changed already: an unreachable receiver must not fail the promotion.
        print(f"warning: the webhook was not called: {_cause(error)}", flush=True)


def _post(body: dict[str, object]) -> None:
    url = workspace.webhook()
    if url is None:
        return
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 (checked above)
    with urllib.request.urlopen(request, timeout=SECONDS):  # noqa: S310
        pass


def _cause(error: Exception) -> str:
    """Return what failed without the address; other exceptions may quote it."""
    if isinstance(error, StageError):
        return str(error)
    host = urllib.parse.urlsplit(os.environ[workspace.WEBHOOK].strip()).hostname
    return f"{host}: {f'status {error.code}' if isinstance(error, urllib.error.HTTPError) else type(error).__name__}"

"""The Prefect flow run that is recorded with a model version, asked for over HTTP."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request

from tasks.params.redaction import redacted, without_user
from tasks.provenance.checks import Check

NAME = "Prefect run"
SECONDS = 5.0


def check(flow_run: str | None) -> Check:
    """Ask the server of PREFECT_API_URL for a flow run; without that variable nothing is checked."""
    if flow_run is None:
        return Check(NAME, None, "none was recorded, because no flow ran the chain")
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        return Check(NAME, None, f"{flow_run}; set PREFECT_API_URL, which 'make serve' prints, to look it up")
    try:
        found = _read(f"{without_user(api).rstrip('/')}/flow_runs/{flow_run}")
    except urllib.error.HTTPError as error:
        reason = "does not know it" if error.code == 404 else f"answers {error.code}"
        return Check(NAME, False if error.code == 404 else None, f"{flow_run}; {redacted(api)} {reason}")
    except (OSError, ValueError) as error:
        return Check(NAME, None, f"{flow_run}; {redacted(api)} does not answer ({getattr(error, 'reason', error)})")
    return Check(NAME, True, f"{found['name']} ({flow_run}), {found['state_name']}")


def _read(address: str) -> dict[str, str]:
    headers = {}
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    elif login := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    request = urllib.request.Request(address, headers=headers)  # noqa: S310 - the address is the user's own setting
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
        found: dict[str, str] = json.load(answer)
        return found

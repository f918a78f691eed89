"""Prefect automations that call a webhook when a flow run fails, crashes, is late or is stuck.

The address comes from `AFTERIMAGE_WEBHOOK_URL` and is stored in an encrypted block of Prefect, never in an automation.
Without the variable nothing changes; an empty value removes the automations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore, CallWebhook, EventTrigger, Posture
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.types import SecretDict
from pydantic import SecretStr

from tasks.runtime import workspace

BLOCK = "afterimage-webhook"
PREFIX = "afterimage: notify of "
RUN = "prefect.flow-run."
ENDS = frozenset(f"{RUN}{state}" for state in ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed"))


@dataclass(frozen=True)
class Limits:
    """After how many seconds a run without another state is reported."""

    pending: float = 600.0
    """Taken by a worker, and not running."""
    running: float = 24 * 3600.0


PAYLOAD = """{"event": "%s",
 "text": {{ (flow_run.name ~ ": %s" ~ ((": " ~ flow_run.state.message) if flow_run.state.message else "")) | tojson }},
 "flow": {{ (flow.name or "") | tojson }},
 "deployment": {{ (deployment.name or "") | tojson }},
 "flow_run": {{ (flow_run.id | string) | tojson }},
 "state": {{ (flow_run.state.name or "") | tojson }},
 "url": {{ (flow_run | ui_url or "") | tojson }}}"""
"""Body of a notification: a Jinja template of JSON with the kind of the event and its clause for people."""


def set_up(limits: Limits | None = None) -> str | None:
    """Create, update or remove the automations; returns a sentence for the user, or None if nothing is configured.

    Raises:
        StageError: if the address is not one of the web.
    """
    if workspace.WEBHOOK not in os.environ:
        return None
    address = workspace.webhook()
    wanted = list(_automations(_block(address), limits or Limits())) if address else []
    with get_client(sync_client=True) as client:
        known = {found.name: found.id for found in client.read_automations() if found.name.startswith(PREFIX)}
        for automation in wanted:
            if identity := known.pop(automation.name, None):
                client.update_automation(identity, automation)
            else:
                client.create_automation(automation)
        for identity in known.values():
            client.delete_automation(identity)
    if not address:
        return f"{workspace.WEBHOOK} is empty: notifications are off"
    return f"failed, late and stuck runs are reported to the webhook of {workspace.WEBHOOK}"


def _block(address: str) -> UUID:
    """Store the address in the webhook block of this project, and return the block's id."""
    # Prefect sends the payload of an automation as text, without a type of its own.
    headers = SecretDict({"Content-Type": "application/json"})
    return Webhook(url=SecretStr(address), headers=headers).save(BLOCK, overwrite=True, _sync=True)


def _automations(block: UUID, limits: Limits) -> Iterator[AutomationCore]:
    ended = {f"{RUN}{state}" for state in ("Failed", "TimedOut")}
    started = {f"{RUN}Running", *ENDS}
    kinds = {
        "failed": ("failed", _reactive(ended)),
        "crashed": ("crashed", _reactive({f"{RUN}Crashed"})),
        "late": ("has not started in time", _reactive({f"{RUN}Late"})),
        "stuck-pending": ("was taken by a worker and does not start", _silent("Pending", started, limits.pending)),
        "stuck-running": ("runs unusually long", _silent("Running", set(ENDS), limits.running)),
    }
    for kind, (clause, trigger) in kinds.items():
        action = CallWebhook(block_document_id=block, payload=PAYLOAD % (kind, clause))
        yield AutomationCore(name=f"{PREFIX}{kind} runs", trigger=trigger, actions=[action])


def _reactive(expected: set[str]) -> EventTrigger:
    """Fire at once for every flow run that enters one of the states."""
    return EventTrigger(
        match={"prefect.resource.id": [f"{RUN}*"]},
        expect=expected,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _silent(state: str, expected: set[str], seconds: float) -> EventTrigger:
    """Fire for every flow run that enters `state`, and none of the expected states within `seconds` (10 or more)."""
    return EventTrigger(
        match={"prefect.resource.id": [f"{RUN}*"]},
        after={f"{RUN}{state}"},
        expect=expected,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=seconds),
    )

"""Prefect automations that call a webhook or another service when a flow run fails, crashes, is late or is stuck.

The address of the webhook comes from `AFTERIMAGE_WEBHOOK_URL` and is stored in an encrypted block of Prefect, never in
an automation. `AFTERIMAGE_NOTIFICATION_BLOCK` names a block of Prefect for Slack, e-mail and other services. Without
the variables nothing changes; empty values remove the automations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore, CallWebhook, EventTrigger, Posture, SendNotification
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.actions import ActionTypes
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from tasks.runtime import workspace
from tasks.runtime.errors import StageError

SERVICE = "AFTERIMAGE_NOTIFICATION_BLOCK"
"""Variable with a notification block of Prefect, as TYPE/NAME: slack-webhook/team, sendgrid-email/team."""
BLOCK = "afterimage-webhook"
PREFIX = "afterimage: notify of "
RUN = "prefect.flow-run."
ENDS = frozenset(f"{RUN}{state}" for state in ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed"))
WAITS = frozenset(f"{RUN}{state}" for state in ("Scheduled", "Late", "AwaitingConcurrencySlot", "AwaitingRetry"))
"""States of a run that no worker has, such as one that was given back."""


@dataclass(frozen=True)
class Limits:
    """After how many seconds a run without another state is reported."""

    pending: float = 600.0
    """Taken by a worker, and not running."""
    running: float = 24 * 3600.0


Notify = Callable[[str, str], ActionTypes]
"""Makes the action for a kind of event and its clause."""

TEXT = """{{ flow_run.name }}: %s{{ (": " ~ flow_run.state.message) if flow_run.state.message else "" }}
{{ flow_run | ui_url or "" }}"""
"""A notification for people: a Jinja template with the clause of the event."""

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
        StageError: if the address is not one of the web, or there is no such block.
    """
    if not {workspace.WEBHOOK, SERVICE} & os.environ.keys():
        return None
    with get_client(sync_client=True) as client:
        ways = dict(_ways(client))
        wanted = list(_automations(list(ways.values()), limits or Limits())) if ways else []
        known = {found.name: found.id for found in client.read_automations() if found.name.startswith(PREFIX)}
        for automation in wanted:
            if identity := known.pop(automation.name, None):
                client.update_automation(identity, automation)
            else:
                client.create_automation(automation)
        for identity in known.values():
            client.delete_automation(identity)
    if not ways:
        return f"{workspace.WEBHOOK} and {SERVICE} are empty: notifications are off"
    return f"failed, crashed, late and stuck runs are reported to the {' and the '.join(ways)}"


def _ways(client: SyncPrefectClient) -> Iterator[tuple[str, Notify]]:
    """The configured receivers, in words, and how to reach each."""
    if address := workspace.webhook():
        webhook = _block(address)
        yield (
            f"webhook of {workspace.WEBHOOK}",
            lambda kind, clause: CallWebhook(block_document_id=webhook, payload=PAYLOAD % (kind, clause)),
        )
    if place := os.environ.get(SERVICE, "").strip():
        service = _service(client, place)
        yield (
            f"block {place}",
            lambda kind, clause: SendNotification(
                block_document_id=service, subject=f"Afterimage: {kind} run", body=TEXT % clause
            ),
        )


def _service(client: SyncPrefectClient, place: str) -> UUID:
    """Id of the notification block TYPE/NAME; raises `StageError` if there is none."""
    kind, _, name = place.partition("/")
    remedy = f"create it on the page Blocks, and set {SERVICE} to TYPE/NAME, such as slack-webhook/team"
    try:
        found = client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        raise StageError(f"Prefect has no block {place}; {remedy}") from None
    if found.block_schema is None or "notify" not in found.block_schema.capabilities:
        raise StageError(f"the block {place} sends no notifications; {remedy}")
    return found.id


def _block(address: str) -> UUID:
    """Store the address in the webhook block of this project, and return the block's id."""
    # Prefect sends the payload of an automation as text, without a type of its own.
    headers = SecretDict({"Content-Type": "application/json"})
    return Webhook(url=SecretStr(address), headers=headers).save(BLOCK, overwrite=True, _sync=True)


def _automations(ways: list[Notify], limits: Limits) -> Iterator[AutomationCore]:
    ended = {f"{RUN}{state}" for state in ("Failed", "TimedOut")}
    # Pending itself is among them: a run that is taken a second time gets its whole time again.
    awaited = {f"{RUN}Pending", f"{RUN}Running", *WAITS, *ENDS}
    kinds = {
        "failed": ("failed", _reactive(ended)),
        "crashed": ("crashed", _reactive({f"{RUN}Crashed"})),
        "late": ("has not started in time", _reactive({f"{RUN}Late"})),
        "stuck-pending": ("was taken by a worker and does not start", _silent("Pending", awaited, limits.pending)),
        "stuck-running": ("runs unusually long", _silent("Running", set(ENDS), limits.running)),
    }
    for kind, (clause, trigger) in kinds.items():
        actions = [notify(kind, clause) for notify in ways]
        yield AutomationCore(name=f"{PREFIX}{kind} runs", trigger=trigger, actions=actions)


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

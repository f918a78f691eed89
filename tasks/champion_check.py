"""Measure champion and challenger again under one protocol, on the data that is here now, and promote or report.

    python -m tasks.champion_check [data/images outputs/judge]

The protocol is that of `evaluate` in `params.yaml`, declared for the present images and judge. Numbers are remembered
on the versions, so that a check without new data and without a new challenger draws nothing. The decision is stored on
the challenger with the time of the check.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params import ParamsError, load
from tasks.params.redaction import redacted
from tasks.runtime import locks, tracking, workspace
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

    from tasks.evaluation.protocol import Protocol
    from tasks.params import EvaluateParams, RegisterParams
    from tasks.registration.gates import Judged

IMAGES, JUDGE = Path("data/images"), Path("outputs/judge")
CHECKED = "afterimage.checked"
"""Tag of the challenger: time, fingerprint and decision of the last check, as JSON."""


@dataclass(frozen=True)
class Decision:
    """The result of a check."""

    promoted: bool
    sentence: str


@dataclass(frozen=True)
class Bench:
    """What versions are measured with."""

    client: MlflowClient
    images: Path
    judge: Path
    evaluate: EvaluateParams

    def declared(self, version: ModelVersion) -> Protocol:
        """Return the protocol for the classes and prompts of `version`."""
        from models.judges.judge import load_judge
        from tasks.evaluation import protocol
        from tasks.registration import measuring

        with measuring.pipeline_of(version) as pipeline:
            return protocol.declare(pipeline, self.images, load_judge(self.judge), self.evaluate)

    def numbers(self, version: ModelVersion, declared: Protocol, *, guided: bool) -> Judged:
        """Measure a version; the agreement of its ONNX bundle is that of its registration."""
        from tasks.registration import gates, measuring

        found = measuring.numbers(self.client, version, self.judge, self.images, declared, guided=guided)
        psnr = version.tags.get(f"{measuring.TAG}{gates.ONNX_PSNR}")
        return replace(found, onnx_psnr_db=float(psnr) if psnr else None)


def main() -> None:
    """Parse the command line, check, and print one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.champion_check",
        description="Measure champion and challenger under one protocol; promote the challenger if it is better.",
    )
    parser.add_argument("images", nargs="?", type=Path, default=IMAGES, help=f"images of `ingest` (default {IMAGES})")
    parser.add_argument("judge", nargs="?", type=Path, default=JUDGE, help=f"output of `judge` (default {JUDGE})")
    given = parser.parse_args()
    try:
        params = load()
        decision = check(given.images, given.judge, params.register_, params.evaluate)
    except (StageError, ParamsError) as error:
        sys.exit(f"champion_check: error: {redacted(str(error))}")
    print(f"champion_check: {'promoted' if decision.promoted else 'kept'}: {decision.sentence}")


def check(images: Path, judge: Path, params: RegisterParams, evaluate: EvaluateParams) -> Decision:
    """Compare the two versions; moves the alias `champion` if the gates let the challenger pass.

    Raises:
        StageError: if no version is registered, or images or judge are missing.
    """
    client = tracking.connect()
    from mlflow.exceptions import MlflowException

    from tasks.pictures.index import read_index
    from tasks.registration import champions

    data = read_index(images).sha256
    with locks.exclusive(workspace.scratch() / "locks" / "register.lock"):
        try:
            model = client.get_registered_model(params.model_name)
        except MlflowException:
            raise StageError(f"MLflow has no registered model {params.model_name}; run the chain first") from None
        challenger = model.aliases.get(tracking.CHALLENGER)
        if challenger is None:
            raise StageError(f"{params.model_name} has no challenger; run 'dvc repro register'")
        version = client.get_model_version(params.model_name, str(challenger))
        bench = Bench(client, images, judge, evaluate)
        declared = bench.declared(version)
        holder = champions.current(model)
        decision = _decide(bench, version, holder, declared, params)
        if decision.promoted:
            champions.set_champion(client, version, decision.sentence)
        elif holder != int(version.version) and version.tags.get(tracking.PROMOTION) != decision.sentence:
            client.set_model_version_tag(version.name, version.version, tracking.PROMOTION, decision.sentence)
        record = {
            "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "data_sha256": data,
            "fingerprint": declared.fingerprint,
            "decision": decision.sentence[:1000],
        }
        client.set_model_version_tag(version.name, version.version, CHECKED, json.dumps(record, sort_keys=True))
    return decision


def _decide(
    bench: Bench, version: ModelVersion, holder: int | None, declared: Protocol, params: RegisterParams
) -> Decision:
    from tasks.registration import champions, gates

    number = int(version.version)
    found = bench.numbers(version, declared, guided=True)
    shown = f"{found.headline} {found.distance:.4g} (floor {found.floor:.4g})"
    reason = gates.not_good_enough(found, params)
    if holder == number:
        weak = f", but would not pass the gates any more: {reason}" if reason else ", and passes the gates"
        return Decision(False, f"version {number} is champion and challenger; {shown}{weak}")
    reason = champions.why_withdrawn(version) or reason
    if reason is None and holder is not None:
        other = bench.client.get_model_version(version.name, str(holder))
        try:
            reason = gates.not_better(found, bench.numbers(other, declared, guided=False))
        except StageError as error:
            reason = f"champion version {holder} cannot be measured under this protocol ({error})"
    if reason is not None:
        return Decision(False, reason)
    return Decision(True, f"promoted by a check: beats version {holder}" if holder else "promoted by a check")


if __name__ == "__main__":
    main()

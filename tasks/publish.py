"""Publish a registered model to a Hugging Face hub: weights, ONNX bundle, measurements, card and sample grid.

    python -m tasks.publish OWNER/NAME --licence apache-2.0 [--model models:/NAME@champion] [--public]

The repository is private unless `--public` is given. The access token comes from HF_TOKEN or `hf auth login`, another
hub from HF_ENDPOINT. Publishing the same version again changes nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.params import ParamsError, load
from tasks.params.redaction import redacted
from tasks.runtime import tracking
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

GRID = "samples.png"
GRIDS = ("grid_guided.png", "grid_unguided.png")
"""Grids of an evaluation, the best first."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
TAGS = {"none": "unconditional-image-generation", "text": "text-to-image"}
"""Conditioning -> the hub's name of the task; it has none for classes."""


@dataclass(frozen=True)
class Card:
    """What the front matter of a card on the hub says beyond that of the registered model."""

    licence: str
    """Identifier of the hub, such as "apache-2.0", or "other"."""
    base_model: str | None
    """Repository of the weights that training started from."""


def main() -> None:
    """Parse the command line and publish."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.publish", description="Publish a registered model to a Hugging Face hub."
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="repository on the hub; created if it is missing")
    parser.add_argument("--licence", required=True, help="the hub's identifier, such as apache-2.0, or other")
    parser.add_argument("--model", help="models:/NAME@ALIAS or models:/NAME/NUMBER; default: the champion")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="default: train.weights, if they are from a hub")
    parser.add_argument("--public", action="store_true", help="create a public repository, not a private one")
    given = parser.parse_args()
    try:
        uri = given.model or f"models:/{load().register_.model_name}@{tracking.CHAMPION}"
        url = publish(uri, given.repository, given.licence, given.base_model, public=given.public)
    except (StageError, ParamsError) as error:
        sys.exit(f"publish: error: {redacted(str(error))}")
    print(f"publish: {uri} is at {redacted(url)}")


def publish(uri: str, repository: str, licence: str, base_model: str | None = None, *, public: bool = False) -> str:
    """Upload the version that `uri` names, and return the address of the commit.

    Raises:
        StageError: if a name is not valid, MLflow lacks the version, or the hub refuses.
    """
    if not REPOSITORY.fullmatch(repository):
        raise StageError(f"'{repository}' names no repository of a hub; write OWNER/NAME")
    if not LICENCE.fullmatch(licence):
        raise StageError(f"'{licence}' is no licence identifier of the hub; write one such as apache-2.0, or other")
    client = tracking.connect()
    from tasks.provenance import version as versions

    version = versions.find(client, uri)
    with tempfile.TemporaryDirectory(prefix="afterimage-publish-") as scratch:
        folder = versions.download(version, Path(scratch) / "model")
        run = client.get_run(version.run_id)
        base = base_model or _base_of(run.data.params)
        has_grid = _add_grid(client, version, folder)
        card = folder / "README.md"
        card.write_text(_card(card.read_text(encoding="utf-8"), Card(licence, base), has_grid), encoding="utf-8")
        return _upload(folder, repository, f"{version.name} version {version.version}", public=public)


def _base_of(params: dict[str, str]) -> str | None:
    """Return the hub repository among the training parameters, if training started from one."""
    weights = params.get("train.weights", "")
    return weights if REPOSITORY.fullmatch(weights) and not Path(weights).exists() else None


def _add_grid(client: MlflowClient, version: ModelVersion, folder: Path) -> bool:
    """Add the sample grid of the version's latest evaluation to `folder`; returns whether there is one."""
    parent = f"tags.mlflow.parentRunId = '{version.run_id}'"
    experiment = client.get_run(version.run_id).info.experiment_id
    for run in client.search_runs([experiment], parent, order_by=["start_time DESC"]):
        present = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "evaluation")}
        for name in (name for name in GRIDS if name in present):
            file = Path(client.download_artifacts(run.info.run_id, f"evaluation/{name}", str(folder.parent)))
            file.rename(folder / GRID)
            return True
    return False


def _card(text: str, card: Card, has_grid: bool) -> str:
    """Return a model card with the hub's fields in its front matter, and the grid below its title."""
    _, front, body = text.split("---", 2)
    fields = [front.strip("\n"), f"license: {card.licence}"]
    fields += [f"pipeline_tag: {task}" for task in TAGS.values() if task in front]
    fields += [f"base_model: {card.base_model}"] if card.base_model else []
    if has_grid:
        title, _, rest = body.lstrip("\n").partition("\n")
        body = f"\n\n{title}\n\n![Samples]({GRID})\n{rest}"
    return "---\n" + "\n".join(fields) + f"\n---{body}"


def _upload(folder: Path, repository: str, title: str, *, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=title)
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "; set HF_TOKEN to a token with write access" if status in (401, 403) else ""
        raise StageError(f"the hub at {api.endpoint} refuses {repository} with status {status}{remedy}") from None
    except (OSError, ValueError) as error:
        raise StageError(f"the hub at {api.endpoint} cannot be reached ({str(error).splitlines()[0]})") from None
    return str(done.commit_url)


if __name__ == "__main__":
    main()

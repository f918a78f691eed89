"""What a flow run shows in Prefect's pages: metrics, the sample grid, links, which stages ran."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from tasks import params
from tasks.runtime import tracking, workspace

MLFLOW_UI = "http://127.0.0.1:5000"
"""Where `make ui` serves the store of the work tree."""


def publish(stage: str, folder: Path) -> None:
    """Show what `stage` made in the workspace `folder`; most stages have nothing to show."""
    if stage == "evaluate":
        _metrics(folder / "reports" / "metrics.json")
        _grid(folder / "reports" / "evaluation")
    elif stage == "register":
        _links(folder)


def publish_stages(rows: list[dict[str, str]]) -> None:
    """Show which stages ran and which were cached, with their seconds."""
    create_table_artifact(rows, key="stages", description="Stages of this run")


def _metrics(path: Path) -> None:
    """One row a metric: its value, the spread between seed blocks, and what real images score in its place."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        {
            "metric": name,
            "value": _short(value),
            "spread": _short(metrics.get(f"{name}_spread", "")),
            "floor or real": _short(metrics.get(f"{name}_floor", metrics.get(f"{name}_real", ""))),
        }
        for name, value in sorted(metrics.items())
        if isinstance(value, int | float | str) and not name.endswith(("_spread", "_floor", "_real"))
    ]
    create_table_artifact(rows, key="metrics", description="reports/metrics.json")


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _grid(evaluation: Path) -> None:
    """The sample grid, inside the artifact itself: a page of the server cannot read files of the work tree."""
    grids = (evaluation / name for name in ("grid_guided.png", "grid_unguided.png"))
    for path in [path for path in grids if path.exists()][:1]:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f"data:image/png;base64,{data}"
        create_image_artifact(image, key="samples", description=f"reports/evaluation/{path.name}")


def _links(folder: Path) -> None:
    lines = [f"- report: `{folder / 'reports' / 'index.html'}`"]
    lines += [f"- ONNX bundle: `{folder / 'outputs' / 'onnx'}`", *_mlflow_lines(folder)]
    create_markdown_artifact("\n".join(lines), key="links", description="Where the results are")


def _mlflow_lines(folder: Path) -> list[str]:
    """The training run and the model's versions with an alias, as links to MLflow's pages."""
    key = json.loads((folder / "reports" / "train" / "run.json").read_text(encoding="utf-8"))["train_key"]
    name = params.load(folder / "params.yaml").register_.model_name
    client = tracking.connect()
    run = tracking.find_run(client, tracking.TRAIN_KEY, key)
    uri = re.sub(r"//[^/@]*@", "//", workspace.tracking_uri())  # without a password
    pages = uri.rstrip("/") if uri.startswith(("http://", "https://")) else MLFLOW_UI
    lines = [f"- MLflow store: `{uri}`" + (" (`make ui` serves it)" if pages == MLFLOW_UI else "")]
    if run is not None:
        lines.append(f"- [training run]({pages}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})")
    aliases = client.get_registered_model(name).aliases
    lines += [f"- [{name}@{alias}]({pages}/#/models/{name}/versions/{n})" for alias, n in sorted(aliases.items())]
    return lines

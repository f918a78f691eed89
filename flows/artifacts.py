"""Prefect artifacts of a flow run: metrics, the sample grid, links to the results, and which stages ran."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import quote

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from tasks import params
from tasks.params.redaction import redacted, without_user
from tasks.runtime import lineage, markdown, measures, tracking, workspace
from tasks.runtime.errors import StageError

VALIDATION = Path("reports") / "validation" / "index.html"
MLFLOW_UI = "http://127.0.0.1:5000"
"""Address of `make ui`."""


def publish(stage: str, folder: Path) -> None:
    """Publish the artifacts of `stage` from the workspace `folder`; most stages have none."""
    if stage == "evaluate":
        _metrics(folder / "reports" / "evaluation" / measures.FILE)
        _grid(folder / "reports" / "evaluation")
    elif stage == "register":
        _links(folder)


def publish_stages(rows: list[dict[str, str]]) -> None:
    """Publish the table of stages: which ran, which were cached, and their seconds."""
    create_table_artifact(rows, key="stages", description="Stages of this run")


def publish_failure(reason: str, folder: Path) -> None:
    """Publish why a run failed, with the path of its validation report."""
    lines = [reason, "", f"- work tree of the run: `{folder}`"]
    if (folder / VALIDATION).exists():
        lines.append(f"- validation report: `{folder / VALIDATION}`")
    create_markdown_artifact("\n".join(lines), key="failure", description="Why this run failed")


def keep_record(folder: Path, flow_run: str, *, trained: bool) -> None:
    """Keep `dvc.lock` and `params.yaml` of a run, which the next run in the workspace overwrites.

    With the MLflow run of the training if this flow run reached it, else as an artifact of the flow run.
    """
    files = {name: folder / name for name in (lineage.LOCK, lineage.PARAMS)}
    texts = {name: redacted(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    if not (trained and _keep_in_mlflow(folder, flow_run, texts)):
        blocks = [f"`{name}`\n\n```yaml\n{text}```" for name, text in texts.items()]
        create_markdown_artifact("\n\n".join(blocks), key="record", description="State of DVC after this run")


def _keep_in_mlflow(folder: Path, flow_run: str, texts: dict[str, str]) -> bool:
    """Log texts with the training run of `folder`; False if there is none, or MLflow does not answer."""
    key = _train_key(folder)
    if key is None:
        return False
    try:
        client = tracking.connect()
    except StageError:  # the reason why the chain failed, perhaps
        return False
    run = tracking.find_run(client, tracking.TRAIN_KEY, key)
    if run is None:
        return False
    for name, text in texts.items():
        client.log_text(run.info.run_id, text, f"flows/{flow_run}/{name}")
    return True


def _train_key(folder: Path) -> str | None:
    """Key of the training whose report is in `folder`; None in a chain without one."""
    file = folder / "reports" / "train" / "run.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["train_key"]) if file.is_file() else None


def publish_standing(folder: Path) -> str | None:
    """Publish whether the model became champion; returns a clause with the reason if the gates refused it."""
    if not (folder / "reports" / "train" / "run.json").exists():
        return None  # a chain without these stages
    name = params.load(folder / "params.yaml").register_.model_name
    client = tracking.connect()
    aliases = {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
    challenger, champion = aliases.get(tracking.CHALLENGER), aliases.get(tracking.CHAMPION)
    if challenger is None:
        return None
    if challenger == champion:
        text = f"Version {challenger} of `{name}` is the champion."
        create_markdown_artifact(text, key="promotion", description="Decision of the gates")
        return None
    reason = client.get_model_version(name, str(challenger)).tags.get(tracking.PROMOTION, "no reason given")
    stays = f"version {champion} stays champion" if champion else "there is no champion"
    text = f"**Version {challenger} of `{name}` was refused:** {reason}\n\nResult: {stays}."
    create_markdown_artifact(text, key="promotion", description="Decision of the gates")
    return f"{name} version {challenger} refused, {stays}: {reason}"


def _metrics(path: Path) -> None:
    """Publish one row for each measure.

    Columns: guidance scale, value, standard deviation over the seed blocks, and the same measure of real images.
    """
    measured = measures.read(path)
    rows = [
        {
            "measure": row.name,
            "guidance": row.guidance,
            "value": f"{row.value:.4g}",
            "spread": f"{row.spread:.2g}",
            "real images": row.beside,
            "samples": row.samples,
        }
        for row in measured.rows(sorted(measured.measures))
    ]
    description = f"{measured.sampler}, {measured.steps} steps; fingerprint {measured.fingerprint[:12]}"
    create_table_artifact(rows, key="metrics", description=description)


def _grid(evaluation: Path) -> None:
    """Publish the sample grid as a data URI, because the pages of the server cannot read files of the work tree.

    An image artifact would also print the URI, which contains the whole image, as text.
    """
    grids = (evaluation / name for name in ("grid_guided.png", "grid_unguided.png"))
    for path in [path for path in grids if path.exists()][:1]:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        picture = f"![samples](data:image/png;base64,{data})"
        create_markdown_artifact(picture, key="samples", description=f"reports/evaluation/{path.name}")


def _links(folder: Path) -> None:
    lines = [f"- report: {markdown.code(str(folder / 'reports' / 'index.html'))}"]
    lines += [f"- ONNX bundle: {markdown.code(str(folder / 'outputs' / 'onnx'))}", *_mlflow_lines(folder)]
    create_markdown_artifact("\n".join(lines), key="links", description="Where the results are")


def _mlflow_lines(folder: Path) -> list[str]:
    """Links to the MLflow pages of the training run and of the model versions that have an alias."""
    key = _train_key(folder)
    name = params.load(folder / "params.yaml").register_.model_name
    client = tracking.connect()
    run = tracking.find_run(client, tracking.TRAIN_KEY, key) if key else None
    uri = redacted(workspace.tracking_uri())
    is_server = uri.startswith(("http://", "https://"))
    pages = without_user(workspace.tracking_uri()).rstrip("/") if is_server else MLFLOW_UI
    lines = [f"- MLflow store: {markdown.code(uri)}" + (" (`make ui` serves it)" if pages == MLFLOW_UI else "")]
    if run is not None:
        lines.append(f"- [training run]({pages}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})")
    aliases = client.get_registered_model(name).aliases
    shown, place = markdown.escaped(name), quote(name)
    lines += [f"- [{shown}@{alias}]({pages}/#/models/{place}/versions/{n})" for alias, n in sorted(aliases.items())]
    return lines

"""Take the screenshots of the README in a headless browser: the report, pages of MLflow and of Prefect.

make ui & make serve
python -m infra.screenshots docs/images --mlflow http://127.0.0.1:5000 --prefect http://127.0.0.1:4200
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from infra import browser

EXPERIMENT = "afterimage"
WIDTH, HEIGHT = 1440, 900
# By default MLflow opens its pages for language models and its assistant.
MLFLOW_SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
RUNS_TABLE = {
    "searchFilter": "",
    "orderByKey": "attributes.start_time",
    "orderByAsc": False,
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
    "selectedColumns": [
        "metrics.`train/held_out_loss`",
        "metrics.`eval/frechet_distance_unguided`",
        "metrics.`eval/label_accuracy_guided`",
        "params.`train.learning_rate`",
    ],
}
# Plotly shows its tool bar while the mouse is over a chart; a browser without a mouse shows it always.
HIDE_TOOL_BARS = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none }</style>')"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.screenshots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    parser.add_argument("--report", type=Path, default=Path("reports/index.html"))
    parser.add_argument("--mlflow", metavar="ADDRESS", help="a running MLflow server; by default left out")
    parser.add_argument("--prefect", metavar="ADDRESS", help="a running Prefect server; by default left out")
    arguments = parser.parse_args()
    executable = browser.find()
    if executable is None:
        sys.exit(f"screenshots: error: no browser found (looked for {', '.join(browser.NAMES)}); install chromium")
    if not arguments.report.exists():
        sys.exit(f"screenshots: error: {arguments.report} does not exist; run 'dvc repro visualize'")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    addresses = {"report": arguments.report.resolve().as_uri()}
    settings: dict[str, str] = {}
    if arguments.mlflow:
        pages, settings = mlflow_pages(arguments.mlflow.rstrip("/"))
        addresses |= pages
    if arguments.prefect:
        addresses |= prefect_pages(arguments.prefect.rstrip("/"))
    with browser.browse(executable) as page:
        page.theme("light")
        page.size(WIDTH, HEIGHT)
        page.remember(settings)
        for name, address in addresses.items():
            page.visit(address)
            page.settle()
            page.evaluate(HIDE_TOOL_BARS)
            page.screenshot(arguments.folder / f"{name}.png")
            print(f"screenshots: {arguments.folder / name}.png shows {address}", flush=True)


def mlflow_pages(server: str) -> tuple[dict[str, str], dict[str, str]]:
    """File names -> addresses, and the local storage that these pages need.

    The pages: runs as a table and as curves, a comparison of the two latest training runs, the latest run, the model.
    """
    api = f"{server}/api/2.0/mlflow"
    found = _ask(f"{api}/experiments/get-by-name?experiment_name={EXPERIMENT}")
    experiment = found["experiment"]["experiment_id"]
    search = {
        "experiment_ids": [experiment],
        "filter": "tags.`afterimage.kind` = 'training'",
        "order_by": ["attributes.start_time DESC"],
        "max_results": 2,
    }
    runs = [run["info"]["run_id"] for run in _ask(f"{api}/runs/search", search).get("runs", [])]
    models = _ask(f"{api}/registered-models/search?max_results=1").get("registered_models", [])
    table = f"{server}/#/experiments/{experiment}/runs"
    pages = {"mlflow-runs": table, "mlflow-charts": f"{table}?compareRunsMode=CHART"}
    if runs:
        pages["mlflow-run"] = f"{table}/{runs[0]}"
    if len(runs) == 2:
        chosen = f"runs={json.dumps(runs)}&experiments={json.dumps([experiment])}".replace(" ", "")
        pages["mlflow-compare"] = f"{server}/#/compare-runs?{chosen}"
    if models:
        pages["mlflow-model"] = f"{server}/#/models/{models[0]['name']}"
    table_key = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState'
    return pages, MLFLOW_SETTINGS | {table_key: json.dumps(RUNS_TABLE)}


def prefect_pages(server: str) -> dict[str, str]:
    """File names -> addresses: the deployments and the latest flow run."""
    pages = {"prefect-deployments": f"{server}/deployments"}
    begun = {"start_time": {"is_null_": False}}  # planned runs have none
    runs = _ask(f"{server}/api/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": begun})
    if runs:
        pages["prefect-run"] = f"{server}/runs/flow-run/{runs[0]['id']}"
    return pages


def _ask(address: str, body: dict[str, object] | None = None) -> Any:  # JSON of two servers
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return json.load(answer)
    except OSError as error:
        sys.exit(f"screenshots: error: {address} does not answer ({error}); start it with 'make ui' or 'make serve'")


if __name__ == "__main__":
    main()

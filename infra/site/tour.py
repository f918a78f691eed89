"""The page "A tour in pictures": the notebook `docs/tour.py`, executed while the site is built.

The executed notebook is kept in the scratch folder until the script or the model changes. Pages are made here and not
by mkdocs-jupyter, whose pages load MathJax from a CDN and have a style of their own.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any, TypeAlias

import jupytext
import nbclient

from tasks.runtime import workspace

Node: TypeAlias = Any  # a notebook or one of its cells: a dictionary whose entries are attributes as well
SCRIPT = Path("docs/tour.py")
NEEDED = (
    Path("outputs/pipeline/afterimage.json"),
    Path("outputs/judge/judge.json"),
    Path("data/images/index.json"),
    Path("reports/evaluation/timesteps.csv"),
    Path("reports/train/history.csv"),
)
"""Files of the chain that the notebook reads, and by which a kept notebook is recognised."""
TIMEOUT_SECONDS = 300
ABSENT = "Run `make repro` to see the pictures of this page: the files that it shows do not exist yet."


def pages(root: Path) -> dict[str, str | bytes]:
    """Return the page and the pictures of the notebook by their names in the site.

    Without the files of the chain, the page shows the code and a sentence that names the remedy.
    """
    notebook = jupytext.read(root / SCRIPT, fmt="py:percent")
    if not all((root / file).exists() for file in NEEDED):
        notebook.cells[0].source += f"\n\n{ABSENT}"
        return {"tour.md": "\n\n".join(_cell(cell, 0, {}) for cell in notebook.cells) + "\n"}
    done = executed(notebook, root)
    files: dict[str, str | bytes] = {}
    text = "\n\n".join(_cell(cell, number, files) for number, cell in enumerate(done.cells))
    files["tour.ipynb"] = jupytext.writes(done, fmt="ipynb").encode()
    return files | {"tour.md": f"{text}\n\n[Download the executed notebook](tour.ipynb).\n"}


def executed(notebook: Node, root: Path) -> Node:
    """Return the notebook with its outputs, from the scratch folder if nothing that it reads has changed.

    Raises:
        ValueError: if a cell fails.
    """
    digest = hashlib.sha256()
    for file in (SCRIPT, *NEEDED):
        digest.update((root / file).read_bytes())
    kept = root / workspace.scratch() / "tour" / f"{digest.hexdigest()[:16]}.ipynb"
    if kept.exists():
        return jupytext.read(kept, fmt="ipynb")
    client = nbclient.NotebookClient(
        notebook,
        timeout=TIMEOUT_SECONDS,
        kernel_name="python3",
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(root)}},
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise ValueError(f"a cell of {SCRIPT} failed: {error.ename}: {error.evalue}") from None
    kept.parent.mkdir(parents=True, exist_ok=True)
    jupytext.write(notebook, kept, fmt="ipynb")
    return notebook


def _cell(cell: Node, number: int, files: dict[str, str | bytes]) -> str:
    """Return one cell as Markdown, and add its pictures to `files`."""
    if cell.cell_type != "code":
        return str(cell.source)
    parts = [f"```python\n{cell.source}\n```"]
    for place, output in enumerate(cell.get("outputs", ())):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(f"```text\n{output.text.rstrip()}\n```")
        elif "image/png" in output.get("data", {}):
            name = f"tour/{number}-{place}.png"
            files[name] = base64.b64decode(output.data["image/png"])
            parts.append(f"![{cell.metadata.get('alt', '')}]({name})")
    return "\n\n".join(parts)

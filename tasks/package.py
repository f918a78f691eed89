"""Stage `package`: the folder that will be registered, made of what the other stages wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.formats import images, model_folder
from tasks.report.model_card import model_card
from tasks.runtime import atomic, stage


def package(
    pipeline: Path, onnx: Path, accepted: Path, data: Path, training: Path, metrics: Path, export: Path, model: Path
) -> None:
    """Put weights, ONNX bundle, metrics and model card together in `model`.

    `data` holds the images, of which the card tells source and licence; `training`, `metrics` and `export`
    are the reports of those stages. The same inputs give the same bytes.
    """
    images.require_accepted(accepted)
    card = model_card(
        info=_read(pipeline / "afterimage.json"),
        data=images.read_index(data),
        training=_read(training / "run.json")["params"],
        metrics=_read(metrics),
        exported=_read(export),
    )
    with atomic.writing_folder(model) as folder:
        shutil.copytree(pipeline, folder / model_folder.PIPELINE)
        shutil.copytree(onnx, folder / model_folder.BUNDLE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(metrics, folder / model_folder.METRICS)
        shutil.copyfile(export, folder / model_folder.EXPORT)
        atomic.write_text(folder / model_folder.CARD, card)
    print(f"package: {model}, content {model_folder.content_key(model)[:12]}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    stage.main(package)

"""Stage `package`: the folder that will be registered, made of what the other stages wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.formats import model_folder
from tasks.formats.model_card import model_card
from tasks.formats.verdict import require_accepted
from tasks.pictures.index import read_index
from tasks.runtime import atomic, integrity, measures, stage


def package(
    pipeline: Path, onnx: Path, accepted: Path, data: Path, training: Path, evaluation: Path, export: Path, model: Path
) -> None:
    """Put weights, ONNX bundle, measurements and model card together in `model`.

    `data` holds the images, of which the card tells source and licence; `training`, `evaluation` and `export`
    are the reports of those stages. The same inputs give the same bytes.
    """
    require_accepted(accepted)
    card = model_card(
        info=integrity.read_described(pipeline, "afterimage.json", "train"),
        data=read_index(data).to_json(),
        training=_read(training / "run.json")["params"],
        measured=measures.read(evaluation / measures.FILE),
        exported=_read(export),
    )
    with atomic.writing_folder(model) as folder:
        shutil.copytree(pipeline, folder / model_folder.PIPELINE)
        shutil.copytree(onnx, folder / model_folder.BUNDLE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(evaluation / measures.FILE, folder / model_folder.MEASUREMENTS)
        shutil.copyfile(export, folder / model_folder.EXPORT)
        atomic.write_text(folder / model_folder.CARD, card)
    print(f"package: {model}, content {model_folder.content_key(model)[:12]}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    stage.main(package)

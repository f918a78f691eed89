"""Stage `package`: put weights, ONNX bundle, measurements and model card into the folder that is registered."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.formats import model_folder
from tasks.formats.model_card import DataFacts, ModelFacts, NetworkFacts, model_card
from tasks.formats.model_folder import ExportReport
from tasks.formats.verdict import require_accepted
from tasks.pictures.index import read_index
from tasks.runtime import atomic, integrity, measures, stage


def package(
    pipeline: Path, onnx: Path, accepted: Path, data: Path, training: Path, evaluation: Path, export: Path, model: Path
) -> None:
    """Put weights, ONNX bundle, measurements and model card together in `model`.

    `data` is the folder of images, whose source and licence the card names; `training`, `evaluation` and `export` are
    the reports of those stages. Equal inputs give equal bytes.
    """
    require_accepted(accepted)
    card = model_card(
        info=ModelFacts.model_validate(integrity.read_described(pipeline, "afterimage.json", "train")),
        network=_network(pipeline),
        data=DataFacts.model_validate(read_index(data).to_json()),
        training=integrity.read_json(training / "run.json", "train")["params"],
        measured=measures.read(evaluation / measures.FILE),
        exported=ExportReport.read(export),
    )
    with atomic.writing_folder(model) as folder:
        shutil.copytree(pipeline, folder / model_folder.PIPELINE)
        shutil.copytree(onnx, folder / model_folder.BUNDLE, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(evaluation / measures.FILE, folder / model_folder.MEASUREMENTS)
        shutil.copyfile(export, folder / model_folder.EXPORT)
        atomic.write_text(folder / model_folder.CARD, card)
    print(f"package: {model}, content {model_folder.content_key(model)[:12]}")


def _network(pipeline: Path) -> NetworkFacts:
    folder = next(name for name in ("unet", "transformer") if (pipeline / name).is_dir())
    index = pipeline / "model_index.json"
    config = integrity.read_json(pipeline / folder / "config.json", "train")
    return NetworkFacts(
        kind=config["_class_name"],
        folder=folder,
        pipeline=integrity.read_json(index, "train")["_class_name"] if index.exists() else None,
        patch_size=config.get("patch_size", 1) if folder == "unet" else 1,
    )


if __name__ == "__main__":
    stage.main(package)

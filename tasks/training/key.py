"""What names a training run: everything that determines its weights, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tasks.params import NO_PATH, DiffusionParams, ModelParams, TrainParams
from tasks.runtime import atomic, closure
from tasks.training import checkpoint

# Parameters of `train` that change no weight, so that a checkpoint made under another value still serves.
FREE = {"log_every", "checkpoint_every", "sample_every", "data_on_device", "init_from", "weights"}
NO_WEIGHT = {
    "models/networks/autoencoder.py": "decodes previews; `encode` made the latents, whose digest is in the key",
    "models/flops.py": "counts operations for the log",
    "models/pictures.py": "draws the grids of previews",
    "models/pipeline.py": "writes finished weights",
    "models/samplers.py": "draws previews",
    "tasks/training/launch.py": "starts the processes, whose number is in the key",
    "tasks/runtime/measures.py": "copies what `codec` measured into the log",
    "tasks/training/memory.py": "returns freed memory to the system",
    "tasks/transfer/objects.py": "downloads first weights, whose sha256 is in the key",
    "tasks/training/previews.py": "draws previews",
    "tasks/training/tracked.py": "logs to MLflow",
    "tasks/training/key.py": "makes this key",
    "tasks/formats/verdict.py": "reads whether the data was accepted",
    "tasks/pretrained/weights.py": "finds first weights, whose sha256 is in the key",
}
"""Files that `train` imports and that cannot alter a weight or the history, each with the reason: a change in them does
not discard a training. Every other file that it imports is in the key."""
FACTS = "facts.json"
THREADS = "threads"


def facts(
    index: dict[str, Any],
    codec: Path,
    verdict: Any,
    model: ModelParams,
    diffusion: DiffusionParams,
    params: TrainParams,
) -> dict[str, Any]:
    """Keys and parameters of the run, JSON.

    `train_key` names the weights in the pipeline, `trajectory_key` the way there: it leaves out what cannot change a
    weight up to a step, which `trajectory` lists.
    """
    import torch

    sections = {"model": model, "diffusion": diffusion, "train": params}
    flat = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.model_dump().items()}
    flat["train.init_from"] = Path(params.init_from).name
    if params.weights and Path(params.weights).is_absolute():
        flat["train.weights"] = Path(params.weights).name  # where it lies is this machine's business
    determining = {key: value for key, value in flat.items() if key.removeprefix("train.") not in FREE}
    data = {"digest": index["digest"], "codec": _sha256(codec / "codec.json")}
    if params.init_from != NO_PATH:
        data["init_from"] = _sha256(weights_of(Path(params.init_from)))
    trajectory = {
        **{key: value for key, value in determining.items() if not _is_free(key, params)},
        **{f"data {name}": value for name, value in data.items()},
        **{f"code {path}": sha256 for path, sha256 in closure.hashes(code()).items()},
        "torch": torch.__version__,
        **_arithmetic(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    return {
        "train_key": _digest([trajectory, determining]),
        "trajectory_key": _digest(trajectory),
        "trajectory": trajectory,
        "params": {key: json.dumps(value) if isinstance(value, list | tuple) else value for key, value in flat.items()},
        "data": {**data, "images": verdict.get("sha256", "")},
    }


def code() -> list[str]:
    """The source files that decide the weights: all that `train` imports except `NO_WEIGHT`."""
    return [path for path in closure.closure("tasks/train.py") if path not in NO_WEIGHT]


def _arithmetic() -> dict[str, Any]:
    """What sums are computed by: on a CPU their order, and with it the weights, depends on the number of threads."""
    import torch

    if torch.cuda.is_available():
        return {"device": "cuda"}
    return {"device": "cpu", THREADS: torch.get_num_threads()}


def folder_of(scratch: Path, facts: dict[str, Any]) -> Path:
    """Where the checkpoints of this trajectory lie, below the `scratch` folder."""
    return scratch / "train" / facts["trajectory_key"][:16]


def write_trajectory(folder: Path, facts: dict[str, Any]) -> None:
    """Leave in the folder of checkpoints what they belong to."""
    atomic.write_json(folder / FACTS, facts["trajectory"])


def changed_since(folder: Path, facts: dict[str, Any]) -> str | None:
    """Where the newest checkpoint of another trajectory lies and what changed since; None where there is none."""
    others = [path.parent for path in folder.parent.glob(f"*/{FACTS}") if path.parent != folder]
    held = [(max(path.stat().st_mtime for path in steps), other) for other in others if (steps := _checkpoints(other))]
    if not held:
        return None
    newest = max(held)[1]
    before = json.loads((newest / FACTS).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(facts["trajectory"]))
    told = f"{_told(before, now)}; the checkpoints made before that stay in {newest}"
    if before.get(THREADS) and before | {THREADS: now.get(THREADS)} == now:
        told += f", and OMP_NUM_THREADS={before[THREADS]} continues them"
    return told


def weights_of(folder: Path) -> Path:
    """The file of weights in a pipeline folder, or in one that holds a diffusers network alone."""
    name = "diffusion_pytorch_model.safetensors"
    return folder / "unet" / name if (folder / "unet").is_dir() else folder / name


def _told(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed in one line: parameters with their values, data and code by their names."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    parameters = [key for key in keys if not key.startswith(("data ", "code "))]
    told = checkpoint.differences({k: before.get(k) for k in parameters}, {k: now.get(k) for k in parameters})
    return ", ".join([*([told] if told else []), *(key for key in keys if key not in parameters)])


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("step-*"))


def _is_free(key: str, params: TrainParams) -> bool:
    """More steps under a learning rate that is constant after warm-up only continue a shorter run; which average goes
    into the pipeline is chosen at the end."""
    return key == "train.pipeline_ema" or (key == "train.steps" and params.lr_schedule == "constant")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""The identity of a training run: everything that determines its weights, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.hashing import file_sha256
from models.json_files import JsonObject, read_json
from tasks.formats.codec_info import FILE as CODEC_FILE
from tasks.params import NO_PATH, DiffusionParams, ModelParams, TrainParams
from tasks.runtime import atomic, closure
from tasks.training import checkpoint, sharded
from tasks.training.backward import workers_for

if TYPE_CHECKING:
    from tasks.formats.latents import LatentsIndex
    from tasks.formats.prior import Prior
    from tasks.formats.training_record import Scalar
    from tasks.formats.verdict import Verdict

FREE = {"log_every", "checkpoint_every", "sample_every", "data_on_device", "init_from", "weights"}
"""Parameters of the section train that change no weight: a checkpoint made with another value is still valid."""
NO_WEIGHT = {
    "models/networks/autoencoder.py": "decodes previews; `encode` made the latents, whose digest is in the key",
    "models/flops.py": "counts operations for the log",
    "models/images/pictures.py": "draws the grids of previews",
    "models/pipeline.py": "writes finished weights",
    "models/noise/editing.py": "draws from a given image, which previews do not",
    "models/noise/samplers.py": "draws previews",
    "models/noise/spacing.py": "chooses the timesteps of previews",
    "tasks/formats/averages.py": "describes copies of the averages",
    "tasks/formats/codec_info.py": "reads the description of the codec, whose hash is in the key",
    "tasks/formats/prior.py": "describes the images of DreamBooth, whose digest is in the key",
    "tasks/formats/training_record.py": "writes the identity of the run for the report",
    "tasks/pretrained/weights.py": "finds first weights, whose sha256 is in the key",
    "tasks/training/averages.py": "copies the averages",
    "tasks/training/key.py": "makes this key",
    "tasks/training/launch.py": "starts the processes, whose number is in the key",
    "tasks/training/memory.py": "returns freed memory to the system",
    "tasks/training/meter.py": "measures speed and memory for MLflow",
    "tasks/training/previews.py": "draws previews",
    "tasks/training/stopping.py": "ends a run after a whole step when a signal arrives",
    "tasks/training/tracked.py": "logs to MLflow",
    "tasks/transfer/objects.py": "downloads first weights, whose sha256 is in the key",
}
"""Files that `train` imports although they cannot change a weight or the history, with the reason.

Editing them does not discard a training; every other file that `train` imports is part of the key.
"""
TRAJECTORY_FILE = "facts.json"
THREADS, WORKERS = "threads", "workers"


@dataclass(frozen=True)
class RunFacts:
    """Identity and parameters of a run; the fields are those of `TrainingRecord`."""

    train_key: str
    """Names the weights in the pipeline."""
    trajectory_key: str
    """Names the checkpoints: it leaves out parameters that change no weight before the last step."""
    trajectory: JsonObject
    """What `trajectory_key` covers."""
    params: dict[str, Scalar]
    data: dict[str, str]


def run_facts(
    index: LatentsIndex,
    codec: Path,
    verdict: Verdict,
    model: ModelParams,
    diffusion: DiffusionParams,
    params: TrainParams,
    prior: Prior | None = None,
) -> RunFacts:
    """Derive keys and parameters of the run from its inputs, its parameters and the code."""
    sections = {"model": model.used(), "diffusion": diffusion.model_dump(), "train": params.model_dump()}
    flat = dict(_flattened(sections))
    flat["train.init_from"] = Path(params.init_from).name
    if params.weights and Path(params.weights).is_absolute():
        flat["train.weights"] = Path(params.weights).name  # a local folder may lie elsewhere on another machine
    determining = {key: value for key, value in flat.items() if key.removeprefix("train.") not in FREE}
    data = {"digest": index.digest, "codec": file_sha256(codec / CODEC_FILE)}
    if params.init_from != NO_PATH:
        data["init_from"] = file_sha256(weights_file(Path(params.init_from)))
    if prior is not None:
        data["prior"] = prior.digest
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trajectory = {
        **{key: value for key, value in determining.items() if not _extends(key, params)},
        **{f"data {name}": value for name, value in data.items()},
        **{f"code {path}": sha256 for path, sha256 in closure.hashes(code()).items()},
        "torch": torch.__version__,
        **_arithmetic(model, params, processes),
        "processes": processes,
    }
    return RunFacts(
        train_key=_digest([trajectory, determining]),
        trajectory_key=_digest(trajectory),
        trajectory=json.loads(json.dumps(trajectory)),
        params={key: json.dumps(value) if isinstance(value, list | tuple) else value for key, value in flat.items()},
        data={**data, "images": verdict.sha256},
    )


def _flattened(sections: JsonObject, prefix: str = "") -> Iterator[tuple[str, Any]]:  # JSON values
    """Yield the dotted names of the parameters in nested sections, with their values."""
    for key, value in sections.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def code() -> list[str]:
    """Return the source files that determine the weights: all that `train` imports except `NO_WEIGHT`."""
    return [path for path in closure.closure("tasks/train.py") if path not in NO_WEIGHT]


def _arithmetic(model: ModelParams, params: TrainParams, processes: int) -> JsonObject:
    """Return what the order of summation depends on: the device, FSDP, and on a CPU threads and parts of a batch."""
    mode: JsonObject = {"sharded": True} if sharded.wanted() else {}
    if torch.cuda.is_available():
        return {"device": "cuda", **mode}
    threads = {THREADS: torch.get_num_threads(), WORKERS: workers_for(model, params, processes)}
    return {"device": "cpu", **threads, **mode}


def folder_of(scratch: Path, facts: RunFacts) -> Path:
    """Return the folder of this trajectory's checkpoints, below the `scratch` folder."""
    return scratch / "train" / facts.trajectory_key[:16]


def write_trajectory(folder: Path, facts: RunFacts) -> None:
    """Write beside the checkpoints what their key covers."""
    atomic.write_json(folder / TRAJECTORY_FILE, facts.trajectory)


def changed_since(folder: Path, facts: RunFacts) -> str | None:
    """Describe what changed since the newest checkpoint of another trajectory, and where it lies; None without one."""
    others = [path.parent for path in folder.parent.glob(f"*/{TRAJECTORY_FILE}") if path.parent != folder]
    held = [(max(path.stat().st_mtime for path in steps), other) for other in others if (steps := _checkpoints(other))]
    if not held:
        return None
    newest = max(held)[1]
    before, now = read_json(newest / TRAJECTORY_FILE), facts.trajectory
    line = f"{_changes(before, now)}; the checkpoints made before that stay in {newest}"
    if before.get(THREADS) and before | {key: now.get(key) for key in (THREADS, WORKERS)} == now:
        line += f", and OMP_NUM_THREADS={before[THREADS]} continues them"
    return line


def weights_file(folder: Path) -> Path:
    """Return the file of weights in a pipeline folder, or in the folder of a diffusers network alone."""
    parts = (folder / part for part in ("unet", "transformer"))
    return next((part for part in parts if part.is_dir()), folder) / "diffusion_pytorch_model.safetensors"


def _changes(before: JsonObject, now: JsonObject) -> str:
    """List what changed: parameters with their values, data and code by name."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    parameters = [key for key in keys if not key.startswith(("data ", "code "))]
    changed = checkpoint.differences({k: before.get(k) for k in parameters}, {k: now.get(k) for k in parameters})
    return ", ".join([*([changed] if changed else []), *(key for key in keys if key not in parameters)])


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("step-*"))


def _extends(key: str, params: TrainParams) -> bool:
    """Whether a parameter leaves the weights before the last step as they are.

    More steps at a learning rate that is constant after warm-up continue a shorter run, and the average for the
    pipeline is chosen at the end, unless it is also copied at an earlier step.
    """
    if key == "train.pipeline_ema":
        used_before = params.distil.after if params.distil else params.control_dropout is not None and params.full_steps
        return not params.guide_step and not used_before
    return key == "train.steps" and params.lr_schedule == "constant"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

"""What others published in diffusers format, read as ours: an unconditional U-Net and the schedule it was trained on.

What our network and samplers would not reproduce is refused in one sentence instead of drawn otherwise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import schedules

if TYPE_CHECKING:
    import torch

    from models.networks.unet import UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULES = {
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
    "scaled_linear": "scaled_linear",
}
"""diffusers' name of a schedule -> ours."""
OTHER_DIFFUSION = ("FlowMatch", "FlowMap", "EDM", "CMStochastic", "CosineDPM", "KarrasVe", "ScoreSde")
"""How the names of diffusers' schedulers begin that know no betas."""
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Layers of attention as the first versions of diffusers called them."""


@dataclass(frozen=True)
class Scheduler:
    """A `scheduler_config.json`: `schedule` is our name of the betas (or "trained"), `sampling` what `samplers.sample`
    needs to know to follow it."""

    betas: schedules.Array
    schedule: str
    prediction: str
    sampling: dict[str, Any]


def parts(folder: Path) -> tuple[Path, Path]:
    """Folders of the network and of the scheduler: each its own, or everything in one as in the oldest repositories.

    Raises `FileNotFoundError` for a folder that is no pipeline.
    """
    if (folder / "unet" / "config.json").exists():
        return folder / "unet", folder / "scheduler"
    if (folder / "config.json").exists() and (folder / "scheduler_config.json").exists():
        return folder, folder
    raise FileNotFoundError(2, "no pipeline in diffusers format", str(folder))


def require(config: dict[str, Any], wanted: dict[str, tuple[Any, ...]], whose: str, who: str) -> None:
    """Compare a configuration with the values that we know of each key, the first of which stands for an absent one.

    Raises `ValueError`, which begins with `whose` key it is and ends with `who` knows what.
    """
    for key, known in wanted.items():
        value = config.get(key, known[0])
        if value not in known:
            raise ValueError(f"{whose} {key} is {value!r}; {who} {', '.join(map(repr, known))}")


def read_diffusion(config: dict[str, Any]) -> Scheduler:
    """What a network was trained on, by any scheduler that adds noise by betas, whatever it samples like.

    Raises `ValueError` for another kind of diffusion, such as flow matching or EDM, which our losses do not train.
    """
    name = str(config.get("_class_name", ""))
    if name.startswith(OTHER_DIFFUSION) or "sigma_data" in config:
        raise ValueError(f"its {name} adds noise in another way than by betas, and these losses know no other")
    wanted = {
        "beta_schedule": tuple(SCHEDULES),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "use_flow_sigmas": (False,),
    }
    require(config, wanted, "its scheduler's", "these losses know")
    betas, schedule = _betas(config)
    return Scheduler(betas, schedule, config.get("prediction_type", "epsilon"), {})


def read_scheduler(config: dict[str, Any], clips: bool = True) -> Scheduler:
    """`clips` is whether x0 has bounds, as pixels do. Raises `ValueError` for a scheduler that our samplers do not
    follow; absent keys have diffusers' defaults."""
    wanted: dict[str, Any] = {
        "_class_name": ("DDPMScheduler", "DDIMScheduler"),
        "beta_schedule": tuple(SCHEDULES),
        "clip_sample": (clips,),
        "clip_sample_range": (1.0,),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "set_alpha_to_one": (True,),
        "thresholding": (False,),
        "timestep_spacing": ("leading", "trailing"),
        "variance_type": tuple(VARIANCES),
    }
    require(config, wanted, "the scheduler's", "these samplers know")
    betas, name = _betas(config)
    sampling = {
        "variance": VARIANCES[config.get("variance_type", "fixed_small")],
        "spacing": config.get("timestep_spacing", "leading"),
        "steps_offset": config.get("steps_offset", 0),
    }
    return Scheduler(betas, name, config.get("prediction_type", "epsilon"), sampling)


def _betas(config: dict[str, Any]) -> tuple[schedules.Array, str]:
    timesteps = config.get("num_train_timesteps", 1000)
    limits = config.get("beta_start", schedules.BETA_START), config.get("beta_end", schedules.BETA_END)
    to_zero = config.get("rescale_betas_zero_snr", False)
    if config.get("trained_betas") is None:
        name = SCHEDULES[config.get("beta_schedule", "linear")]
        return schedules.betas(name, timesteps, to_zero, *limits), name
    betas = np.asarray(config["trained_betas"], dtype=np.float64)
    if betas.shape != (timesteps,):
        raise ValueError(f"the scheduler has {betas.size} trained_betas for {timesteps} num_train_timesteps")
    known = (n for n in SCHEDULES.values() if np.allclose(schedules.betas(n, timesteps), betas, rtol=0, atol=1e-6))
    return schedules.rescaled_to_zero_snr(betas) if to_zero else betas, next(known, "trained")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of a network's folder, float32, under today's names. Raises `ValueError` for pickled weights."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).exists() and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds its weights as a pickle, which could run code; let diffusers write them as safetensors "
            "(DDPMPipeline.from_pretrained(...).save_pretrained(...)) where you trust their maker"
        )
    try:
        loaded = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); fetch it again") from None
    state = {}
    for name, tensor in loaded.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new) if ".attentions." in name else name
        state[name] = tensor.to(torch.float32)
    return state


def describe(folder: Path, config: UNetConfig, scheduler: Scheduler) -> dict[str, Any]:
    """What `afterimage.json` would say of an unconditional network; its weights' sha256 stands for the training.

    Raises `ValueError` for a class-conditional one, which does not say what its classes are.
    """
    if config.conditions or config.embedded:
        raise ValueError("the network is class-conditional, and diffusers' format does not say what its classes are")
    return {
        "conditioning": "none",
        "condition_source": "none",
        "classes": [],
        "channels": config.channels,
        "size": config.size,
        "timesteps": len(scheduler.betas),
        "schedule": scheduler.schedule,
        "prediction": scheduler.prediction,
        "null_label": None,
        "train_key": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }

"""Published models in diffusers format: reading their schedulers and weights as ours, and writing our schedulers.

Whatever our network and samplers would not reproduce is rejected in one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.networks.config import DIFFUSERS_VERSION, Supported, require_supported
from models.noise import schedules
from models.noise.paths import FLOW_PREDICTION, PREDICTION_TYPES, RECTIFIED_FLOW, DiffusionPath, RectifiedFlow
from models.noise.samplers import SchedulerConfig

if TYPE_CHECKING:
    from models.json_files import JsonObject

NETWORK_FOLDERS = ("unet", "transformer")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULES = {
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
    "scaled_linear": "scaled_linear",
}
"""`beta_schedule` of diffusers -> name of ours."""
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
OTHER_DIFFUSION = ("FlowMatch", "FlowMap", "EDM", "CMStochastic", "CosineDPM", "KarrasVe", "ScoreSde")
"""First letters of the diffusers schedulers that are neither defined by betas nor `FLOW_SCHEDULER`."""
OF_BETAS = tuple(name for name in PREDICTION_TYPES if name != FLOW_PREDICTION)
"""Prediction types of schedulers with betas."""
VARIANCE_TYPES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large"}
"""`variance_type` of diffusers -> one of `samplers.VARIANCE_TYPES`."""
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention layers in the first versions of diffusers -> names of today."""


@dataclass(frozen=True)
class Scheduler:
    """A `scheduler_config.json`."""

    betas: schedules.Array | None
    """float64 [T]; None for a rectified flow."""
    schedule: str
    """One of `schedules.SCHEDULES`, "rectified_flow", or "trained" for betas that match none of them."""
    config: SchedulerConfig


def parts(folder: Path) -> tuple[Path, Path]:
    """Return the folders of the network and of the scheduler; in the oldest repositories both are `folder` itself.

    Raises:
        FileNotFoundError: if the folder is not a pipeline.
    """
    for network in NETWORK_FOLDERS:
        if (folder / network / "config.json").exists():
            return folder / network, folder / "scheduler"
    if (folder / "config.json").exists() and (folder / "scheduler_config.json").exists():
        return folder, folder
    raise FileNotFoundError(2, "no pipeline in diffusers format", str(folder))


def read_diffusion(config: JsonObject) -> Scheduler:
    """Read the path and prediction type that a network was trained with, from a flow scheduler or one with betas.

    How that scheduler samples is ignored: training needs only the path.

    Raises:
        ValueError: for other kinds of diffusion, such as EDM, which our losses do not train.
    """
    name = str(config.get("_class_name", ""))
    if name == FLOW_SCHEDULER:
        return _flow(config)
    if name.startswith(OTHER_DIFFUSION) or "sigma_data" in config:
        raise ValueError(f"its {name} adds noise neither by betas nor along a rectified flow, which are supported")
    supported: Supported = {
        "beta_schedule": tuple(SCHEDULES),
        "prediction_type": OF_BETAS,
        "use_flow_sigmas": (False,),
    }
    require_supported(config, supported, "scheduler")
    betas, schedule = _betas(config)
    prediction_type = config.get("prediction_type", "epsilon")
    return Scheduler(betas, schedule, SchedulerConfig(DiffusionPath(schedules.alpha_bar(betas)), prediction_type))


def read_scheduler(config: JsonObject, clip_sample: bool = True) -> Scheduler:
    """Read a scheduler for sampling; absent keys take diffusers' defaults.

    `clip_sample` is what the scheduler must say of clipping: true for pixels, false for latents.

    Raises:
        ValueError: for a scheduler that our samplers do not reproduce, in one sentence.
    """
    if config.get("_class_name") == FLOW_SCHEDULER:
        return _read_flow(config)
    supported: Supported = {
        "_class_name": ("DDPMScheduler", "DDIMScheduler", FLOW_SCHEDULER),
        "beta_schedule": tuple(SCHEDULES),
        "clip_sample": (clip_sample,),
        "clip_sample_range": (1.0,),
        "prediction_type": OF_BETAS,
        "set_alpha_to_one": (True,),
        "thresholding": (False,),
        "timestep_spacing": ("leading", "trailing"),
        "variance_type": tuple(VARIANCE_TYPES),
    }
    require_supported(config, supported, "scheduler")
    betas, name = _betas(config)
    return Scheduler(
        betas,
        name,
        SchedulerConfig(
            DiffusionPath(schedules.alpha_bar(betas)),
            config.get("prediction_type", "epsilon"),
            clip_sample,
            VARIANCE_TYPES[config.get("variance_type", "fixed_small")],
            config.get("timestep_spacing", "leading"),
            config.get("steps_offset", 0),
        ),
    )


def _read_flow(config: JsonObject) -> Scheduler:
    """Read a rectified flow for sampling."""
    supported: Supported = {
        "invert_sigmas": (False,),
        "shift_terminal": (None,),
        "stochastic_sampling": (False,),
        "use_beta_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "use_exponential_sigmas": (False,),
        "use_karras_sigmas": (False,),
    }
    require_supported(config, supported, "scheduler")
    return _flow(config)


def _flow(config: JsonObject) -> Scheduler:
    """Return the rectified flow; its scheduler has no prediction type, because its networks predict the velocity."""
    path = RectifiedFlow(config.get("num_train_timesteps", 1000), config.get("shift", 1.0))
    return Scheduler(None, RECTIFIED_FLOW, SchedulerConfig(path, FLOW_PREDICTION, clip_sample=False))


def _betas(config: JsonObject) -> tuple[schedules.Array, str]:
    """Return the betas of a scheduler, float64 [T], and the name of their schedule."""
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


def scheduler_config(betas: schedules.Array, prediction_type: str, clip_sample: bool = True) -> JsonObject:
    """Return the configuration of a diffusers `DDPMScheduler` that denoises as our samplers do.

    It contains the betas themselves. Latents are not clipped, and get the `steps_offset` that Stable Diffusion's
    pipelines warn about otherwise; trailing spacing does not use it.
    """
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": len(betas),
        "trained_betas": [float(beta) for beta in betas],
        "prediction_type": prediction_type,
        "variance_type": "fixed_small",
        "clip_sample": clip_sample,
        "clip_sample_range": 1.0,
        "timestep_spacing": "trailing",
        **({} if clip_sample else {"steps_offset": 1}),
    }


def flow_config(path: RectifiedFlow) -> JsonObject:
    """Return the configuration of a diffusers `FlowMatchEulerDiscreteScheduler`, which takes the steps of `euler`.

    Its default noise levels end at 1 / T; `set_timesteps(sigmas=[1 - i / n for i in range(n)])` gives ours.
    """
    return {
        "_class_name": FLOW_SCHEDULER,
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": path.timesteps,
        "shift": path.shift,
    }


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the state dict in a network's folder, float32, under the layer names of today.

    Raises:
        ValueError: for pickled or damaged weights.
    """
    if not (folder / WEIGHTS).exists() and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds its weights as a pickle, which could run code; if you trust their author, convert them to "
            "safetensors with diffusers: DDPMPipeline.from_pretrained(...).save_pretrained(...)"
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

"""The weights that a training starts from: downloaded if published, compared with the parameters, and loaded.

Weights are valid for one prediction type and one noise schedule. Another prediction type would make the network relearn
everything without a visible sign in the loss, so it is refused. Another noise schedule can be learned, so it triggers a
warning.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.json_files import read_json
from models.networks.network import config_of, load_weights
from models.networks.published import read_diffusion, read_weights
from models.noise import schedules
from models.noise.paths import RECTIFIED_FLOW
from tasks.params import NO_PATH, DiffusionParams, TrainParams
from tasks.pretrained import weights
from tasks.runtime.errors import StageError
from tasks.training import checkpoint, control
from tasks.training import key as training_key

if TYPE_CHECKING:
    from models.networks.network import Network, NetworkConfig
    from tasks.params.model import Architecture

FOLDERS = {"unet": "unet", "dit": "transformer"}
"""`model.architecture` -> folder of the network in a published pipeline."""
SAME_NOISE = 1e-3
"""Schedules whose sqrt(alpha_bar) differ by at most this at every timestep are equal except for rounding."""


@dataclass(frozen=True)
class InitialWeights:
    """A trained pipeline that a training starts from."""

    name: str
    """The parameter that names it, with its value."""
    folder: Path
    network: NetworkConfig


def initial_folder(params: TrainParams, architecture: Architecture) -> Path | None:
    """Return the folder of the pipeline to start from, downloaded if it is published; None starts from random weights.

    Raises:
        StageError: if published weights cannot be downloaded.
    """
    if params.weights is not None and params.pin is not None:
        return weights.local_folder(params.weights, params.pin, (FOLDERS[architecture], "scheduler"))
    return None if params.init_from == NO_PATH else Path(params.init_from)


def initial_weights(params: TrainParams, architecture: Architecture) -> InitialWeights | None:
    """Find the weights to start from; None starts from random weights.

    Raises:
        StageError: if they cannot be downloaded, or their architecture is not supported.
    """
    folder = initial_folder(params, architecture)
    if folder is None:
        return None
    name = f"train.weights {params.weights}" if params.weights else f"train.init_from {params.init_from}"
    file = training_key.weights_file(folder)
    config = file.with_name("config.json")
    if not (file.is_file() and config.is_file()):
        raise StageError(f"{name} holds no pipeline (no {file.name} and config.json); correct it")
    try:
        return InitialWeights(name, folder, config_of(read_json(config)))
    except KeyError as error:
        raise StageError(f"{name} cannot be trained here: its config.json lacks {error}; choose another") from None
    except ValueError as error:
        raise StageError(f"{name} cannot be trained here: {error}; choose another") from None


def check(initial: InitialWeights, config: NetworkConfig, diffusion: DiffusionParams) -> None:
    """Compare architecture, prediction type and noise schedule without reading the weights.

    Prints a warning for another noise schedule, or if no file states the schedule.

    Raises:
        StageError: for another architecture or prediction type, or an unsupported kind of diffusion.
    """
    if type(config) is not type(initial.network):
        raise StageError(
            f"{initial.name} is another kind of network ({type(initial.network).__name__.removesuffix('Config')}, not "
            f"{type(config).__name__.removesuffix('Config')}); set model.architecture and codec.conditioning to fit it"
        )
    ours, theirs = config.to_diffusers(), initial.network.to_diffusers()
    shaping = [key for key in ours | theirs if not key.startswith("_") and key not in ("sample_size", "dropout")]
    unlike = [key for key in shaping if theirs.get(key) != ours.get(key)]
    if unlike:
        listed = checkpoint.differences(*({key: side.get(key) for key in unlike} for side in (theirs, ours)))
        raise StageError(f"{initial.name} is another network ({listed}); set the section model to fit it")
    _check_diffusion(initial, diffusion)


def _check_diffusion(initial: InitialWeights, diffusion: DiffusionParams) -> None:
    own = initial.folder / "scheduler"
    file = (own if own.is_dir() else initial.folder) / "scheduler_config.json"
    if not file.is_file():
        _warn(
            f"{initial.name} has no scheduler_config.json, so its prediction type is unknown; it is trained as "
            f"diffusion.prediction '{diffusion.prediction}' with diffusion.schedule '{diffusion.schedule}'"
        )
        return
    try:
        learned = read_diffusion(read_json(file))
    except ValueError as error:
        raise StageError(f"{initial.name} cannot be trained here: {error}; choose another") from None
    prediction = learned.config.prediction_type
    if (learned.betas is None) != (diffusion.schedule == RECTIFIED_FLOW):
        raise StageError(
            f"{initial.name} learned the path '{learned.schedule}', not '{diffusion.schedule}'; set diffusion.schedule "
            f"to '{learned.schedule}' and diffusion.prediction to '{prediction}'"
        )
    if prediction != diffusion.prediction:
        raise StageError(
            f"{initial.name} predicts {prediction}, not {diffusion.prediction}; "
            f"set diffusion.prediction to {prediction}"
        )
    if learned.betas is not None:
        _compare_noise(initial, learned.betas, learned.schedule, diffusion)


def _compare_noise(initial: InitialWeights, theirs: schedules.Array, schedule: str, diffusion: DiffusionParams) -> None:
    """Warn if the noise level of a timestep differs from that of the initial weights."""
    ours = schedules.betas(diffusion.schedule, diffusion.timesteps, diffusion.zero_terminal_snr)
    levels = [np.sqrt(schedules.alpha_bar(betas)) for betas in (theirs, ours)]
    if len(theirs) == len(ours) and np.abs(levels[0] - levels[1]).max() <= SAME_NOISE:
        return
    remedies = []
    if schedule not in (diffusion.schedule, "trained"):
        remedies.append(f"diffusion.schedule to '{schedule}'")
    if len(theirs) != len(ours):
        remedies.append(f"diffusion.timesteps to {len(theirs)}")
    if (levels[0][-1] == 0) != diffusion.zero_terminal_snr:
        remedies.append(f"diffusion.zero_terminal_snr to {str(levels[0][-1] == 0).lower()}")
    kept = f"set {' and '.join(remedies)}" if remedies else "choose a diffusion.schedule nearer to it"
    _warn(
        f"{initial.name} learned another noise schedule than the section diffusion has (the signal at the last "
        f"timestep is {levels[0][-1]:.3g}, not {levels[1][-1]:.3g}) and must learn it anew; "
        f"{kept} to keep what it learned"
    )


def _warn(sentence: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:  # one of several processes prints
        print(f"train: warning: {sentence}", flush=True)


def load(network: Network, initial: InitialWeights) -> None:
    """Load the weights into a network that `check` accepted.

    Raises:
        StageError: if they are damaged or do not match their config.json.
    """
    file = training_key.weights_file(initial.folder)
    try:
        load_weights(network, read_weights(file.parent))
    except ValueError as error:  # the file is damaged
        raise StageError(str(error)) from None
    except RuntimeError:  # lists every tensor that does not fit
        raise StageError(f"{initial.name}: {file} is not of the network that its config.json describes") from None
    print(f"train: starts from the weights in {initial.folder}", flush=True)
    control.load_initial(network, initial.folder)

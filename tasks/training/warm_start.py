"""The weights that a training starts from: brought here, compared with what the parameters say, loaded.

What a network learned holds for its own prediction and its own noise. Another prediction would train at first against
everything it knows, and nothing in the loss would say why: it is refused. Another schedule of the noise is learned
anew in time; it is told.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.params import NO_PATH, DiffusionParams, TrainParams
from tasks.runtime.stage import StageError
from tasks.training import checkpoint
from tasks.training import key as training_key

if TYPE_CHECKING:
    from models.networks.network import Network, NetworkConfig

SAME_NOISE = 1e-3
"""Two schedules whose sqrt(alpha_bar) nowhere differ by more are one, rounded differently."""


@dataclass(frozen=True)
class Given:
    """A trained pipeline whose weights come first."""

    name: str
    """Which parameter gives it, and what that says."""
    folder: Path
    network: NetworkConfig


def first_weights(params: TrainParams) -> Path | None:
    """The folder of the pipeline whose weights come first, brought here where it is published; None starts from
    nothing. Raises `StageError` where it cannot be had."""
    from tasks.pretrained import weights

    if params.weights is not None and params.pin is not None:
        return weights.bring(params.weights, params.pin, ("unet", "scheduler"))
    return None if params.init_from == NO_PATH else Path(params.init_from)


def given(params: TrainParams) -> Given | None:
    """What training starts from, brought here where it is published. Raises `StageError` where it cannot be had, or is
    no network that we have."""
    from models.networks.network import config_of

    folder = first_weights(params)
    if folder is None:
        return None
    name = f"train.weights {params.weights}" if params.weights else f"train.init_from {params.init_from}"
    weights = training_key.weights_of(folder)
    described = weights.with_name("config.json")
    if not (weights.is_file() and described.is_file()):
        raise StageError(f"{name} holds no pipeline (no {weights.name} and config.json); correct it")
    try:
        return Given(name, folder, config_of(_read(described)))
    except KeyError as error:
        raise StageError(f"{name} cannot be trained here: its config.json lacks {error}; choose another") from None
    except ValueError as error:
        raise StageError(f"{name} cannot be trained here: {error}; choose another") from None


def check(given: Given, config: NetworkConfig, diffusion: DiffusionParams) -> None:
    """Compare architecture, prediction and noise by their small files; the weights are not read.

    Raises `StageError` for another network, another prediction, or another kind of diffusion; prints a warning for
    another schedule of the noise, or where nothing says which it was.
    """
    ours, theirs = config.to_diffusers(), given.network.to_diffusers()
    shaping = [key for key in ours if not key.startswith("_") and key not in ("sample_size", "dropout")]
    unlike = {key: (theirs.get(key), ours[key]) for key in shaping if theirs.get(key) != ours[key]}
    if unlike:
        told = checkpoint.differences(*({key: pair[side] for key, pair in unlike.items()} for side in (0, 1)))
        raise StageError(f"{given.name} is another network ({told}); set the section model to fit it")
    _check_diffusion(given, diffusion)


def _check_diffusion(given: Given, diffusion: DiffusionParams) -> None:
    from models.networks.published import read_diffusion

    own = given.folder / "scheduler"
    file = (own if own.is_dir() else given.folder) / "scheduler_config.json"
    if not file.is_file():
        _warn(
            f"{given.name} has no scheduler_config.json, so nothing says what it predicts; it is taken for "
            f"diffusion.prediction '{diffusion.prediction}' with diffusion.schedule '{diffusion.schedule}'"
        )
        return
    try:
        learned = read_diffusion(_read(file))
    except ValueError as error:
        raise StageError(f"{given.name} cannot be trained here: {error}; choose another") from None
    prediction = learned.config.prediction_type
    if prediction != diffusion.prediction:
        raise StageError(
            f"{given.name} predicts {prediction}, not {diffusion.prediction}; set diffusion.prediction to {prediction}"
        )
    _compare_noise(given, learned.betas, learned.schedule, diffusion)


def _compare_noise(given: Given, theirs: Any, schedule: str, diffusion: DiffusionParams) -> None:
    """Warn where the noise at some timestep is not what the network has seen there."""
    import numpy as np

    from models import schedules

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
        f"{given.name} learned another noise than the section diffusion has (at the last timestep {levels[0][-1]:.3g} "
        f"of the image is left and not {levels[1][-1]:.3g}), which it must learn anew; {kept} to keep what it knows"
    )


def _warn(sentence: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes one speaks
        print(f"train: warning: {sentence}", flush=True)


def load(network: Network, given: Given) -> None:
    """Load the weights into a network that `check` let pass. Raises `StageError` where they are damaged or not those
    of their config.json."""
    from models.networks.network import load_weights
    from models.networks.published import read_weights

    file = training_key.weights_of(given.folder)
    try:
        load_weights(network, read_weights(file.parent))
    except ValueError as error:  # damaged, says the file's reader
        raise StageError(str(error)) from None
    except RuntimeError:  # names every tensor that does not fit
        raise StageError(f"{given.name}: {file} is not of the network that its config.json describes") from None
    print(f"train: starts from the weights in {given.folder}", flush=True)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

"""A ControlNet in a training: the phase in which it is trained, its frozen U-Net, and what is saved of both.

With `train.full_steps` the U-Net is trained first and the ControlNet is then made from it; otherwise from the weights
that `train.weights` or `train.init_from` name. Everything follows from the step, so that a run continues exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from models.networks.controlnet import FOLDER, PREFIX, ControlledUNet, load
from models.networks.published import read_weights
from models.networks.text_unet import TextUNet
from tasks.runtime.errors import StageError
from tasks.training import key as training_key

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from models.networks.network import Network
    from tasks.formats.latents import LatentsIndex
    from tasks.params import TrainParams
    from tasks.training.run import Run


def require_maps(index: LatentsIndex, params: TrainParams) -> None:
    """Raise `StageError` if a ControlNet is to be trained and the data set has no control maps."""
    if params.control_dropout is not None and index.control is None:
        raise StageError("data/latents holds no control maps; set encode.control, and run 'dvc repro encode'")


def begin(run: Run) -> None:
    """At the first step of the ControlNet, go on from the averaged U-Net and copy its encoder; averages start anew."""
    network = run.network
    if not isinstance(network, ControlledUNet) or not run.params.full_steps or run.step != run.params.full_steps:
        return
    trained = run.averages[run.params.pipeline_ema]
    trained.copy_to_module()
    network.copy_encoder()
    for average in run.averages.values():
        average.start_anew()
    run.optimizer.state.clear()


def load_initial(network: Network, folder: Path) -> None:
    """Go on with the ControlNet in the pipeline `folder`, if it holds one and `network` trains one.

    Raises:
        StageError: if it is made for another U-Net or differs in its widths.
    """
    if not isinstance(network, ControlledUNet) or not (folder / FOLDER / "config.json").is_file():
        return
    try:
        found = load(folder / FOLDER, network.config)
        network.control.load_state_dict(found.state_dict())
    except ValueError as error:
        raise StageError(str(error)) from None
    except RuntimeError:
        raise StageError(
            f"the ControlNet in {folder / FOLDER} has other widths than model.control_widths "
            f"{list(network.config.control_widths or ())}; set them to "
            f"{list(found.config.conditioning_embedding_out_channels)}"
        ) from None
    print(f"train: goes on with the ControlNet in {folder / FOLDER}", flush=True)


def narrow_base(network: Network, params: TrainParams, device: torch.device) -> None:
    """Keep weights that are never trained in bfloat16 on a GPU, in which `train.precision` 'bf16' computes anyway.

    They are those of the U-Net of a ControlNet or of a LoRA adapter.
    """
    if not isinstance(network, TextUNet) or not (network.config.control_widths or network.config.lora_rank):
        return
    if params.precision == "bf16" and device.type == "cuda":
        network.freeze_in(torch.bfloat16)


def base_weights(run: Run) -> dict[str, Tensor]:
    """Return the weights of the network by parameter name, float32; a narrowed U-Net is read from its file again."""
    weights = {name: parameter.detach() for name, parameter in run.network.named_parameters()}
    if run.initial and any(value.dtype != torch.float32 for value in weights.values()):
        published = read_weights(training_key.weights_file(run.initial.folder).parent)
        published = {name: value for name, value in published.items() if not name.startswith(PREFIX)}
        weights |= run.network.own_names(published) if isinstance(run.network, TextUNet) else published
    return weights

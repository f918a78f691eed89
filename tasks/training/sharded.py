"""A network whose weights FSDP2 shards among processes, because one device cannot hold them with their optimizer.

accelerate shards it (`ACCELERATE_USE_FSDP`, infra/accelerate/fsdp.yaml) in units: the repeated blocks, and the rest.
Each process holds its part of the weights, gradients, averages and optimizer state. Held-out losses, previews and
checkpoints need the whole network, so every process takes part in them; the first one alone writes.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import torch
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    convert_outputs_to_fp32,
    parse_flag_from_env,
)

from models.networks import compilation
from models.networks.network import build
from models.optimization import sharding
from tasks.runtime.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor, nn

    from models.networks.network import Network
    from tasks.params import TrainParams
    from tasks.training.run import Run

REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "keep weights on the devices (fsdp_offload_params: false)",
    "FSDP_ACTIVATION_CHECKPOINTING": "use train.gradient_checkpointing (fsdp_activation_checkpointing: false)",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "every process builds the network (fsdp_cpu_ram_efficient_loading: false)",
}
"""Options of accelerate's FSDP that training does not support -> what to do."""


def wanted() -> bool:
    """Whether accelerate is configured for FSDP."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check(params: TrainParams, processes: int) -> None:
    """Raise `StageError` for a configuration of FSDP that training does not support."""
    remedy = None
    if os.environ.get("FSDP_VERSION") != "2":
        remedy = "use its second version (fsdp_version: 2)"
    elif processes == 1:
        remedy = "start at least two processes (num_processes), or leave FSDP out"
    elif params.precision == "fp16":
        remedy = "set train.precision to 'bf16' or 'no'"
    elif params.text_encoder:
        remedy = "set train.text_encoder to false, or train on devices that hold the whole network"
    else:
        remedy = next((text for name, text in REFUSED.items() if parse_flag_from_env(name)), None)
    if remedy:
        raise StageError(f"accelerate's configuration of FSDP does not fit: {remedy}, as in infra/accelerate/fsdp.yaml")


def plugin(params: TrainParams) -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's options of FSDP2; None without it.

    In bf16 the weights are gathered in bfloat16 and gradients added in float32. Inputs are not converted, because
    bfloat16 cannot hold timesteps; the layers run under autocast, as without FSDP.
    """
    if not wanted():
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    lower = torch.bfloat16 if params.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def shard_on_cpu(accelerator: Accelerator, options: FullyShardedDataParallelPlugin) -> None:
    """Make accelerate shard on a CPU as well, where it ignores its configuration of FSDP."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = options


def compute_in(network: Network, device: torch.device, params: TrainParams) -> None:
    """Run the network under autocast wherever it is called, with float32 outputs, as accelerate does without FSDP."""
    if params.precision == "bf16":
        cast = torch.autocast(device.type, dtype=torch.bfloat16)
        network.forward = convert_outputs_to_fp32(cast(network.forward))  # type: ignore[method-assign]


def choose_units(network: Network, options: FullyShardedDataParallelPlugin) -> None:
    """Shard the repeated blocks and what several of them share as units, unless the configuration names others."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    if options.auto_wrap_policy is transformer_auto_wrap_policy and not options.transformer_cls_names_to_wrap:
        units = [*compilation.repeated_blocks(network), *shared_modules(network)]
        options.transformer_cls_names_to_wrap = sorted({type(module).__name__ for module in units})


def shared_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules with parameters that several modules hold, without the parts of such a module."""
    uses = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
    shared = [module for module in network.modules() if uses[id(module)] > 1 and any(True for _ in module.parameters())]
    parts = {id(part) for module in shared for part in module.modules() if part is not module}
    return [module for module in shared if id(module) not in parts]


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return tensors with all their rows on the CPU, one after the other, if `keep`; every process calls it."""
    result = {}
    for name, tensor in tensors.items():
        whole = sharding.whole(tensor.detach())
        if keep:
            result[name] = whole.cpu()
    return result


def collect(run: Run) -> None:
    """At the end of a training, replace network and averages by whole ones on the CPU of the first process.

    Every process calls it; a run that is not sharded stays as it is.
    """
    if not run.sharded:
        return
    main = run.accelerator.is_main_process
    weights = gathered(run.network.state_dict(), main)
    averages = {profile: gathered(average.state_dict(), main) for profile, average in run.averages.items()}
    if not main:
        return
    with torch.device("meta"):
        network = build(run.network.config)
    network.load_state_dict(weights, assign=True)  # keeps the type of each weight
    run.network = network
    for profile, average in run.averages.items():
        average.weights = list(averages[profile].values())

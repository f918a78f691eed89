"""Whether the parameters of a training fit the machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from accelerate.utils import parse_flag_from_env

from models.device import set_arithmetic
from tasks.runtime import arithmetic
from tasks.runtime.errors import StageError
from tasks.training import sharded

if TYPE_CHECKING:
    from tasks.params import TrainParams

UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM")
"""Engines that accelerate can be configured for, as in its variables ACCELERATE_USE_*."""

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable with the work space of cuBLAS; of a fixed size, its results are reproducible."""


def check_fits(params: TrainParams) -> None:
    """Raise `StageError`, before data or weights are read, if the parameters do not fit the machine."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = processes * params.gradient_accumulation
    if params.batch_size % parts:
        raise StageError(
            f"train.batch_size {params.batch_size} cannot be shared among {processes} processes in "
            f"{params.gradient_accumulation} accumulated parts; make it a multiple of {parts}"
        )
    _check_devices(params, processes)
    for name in UNSUPPORTED:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise unsupported(name)
    if sharded.wanted():
        sharded.check(params, processes)
    arithmetic.compiles("train.compile", params.compile)
    if params.full_steps and processes > 1:
        raise StageError("train.full_steps works in one process; train the base first, and name it in train.init_from")


def choose_kernels(params: TrainParams) -> None:
    """Set which kernels PyTorch takes on a GPU: those of the precision, the fastest or the deterministic ones.

    With `params.deterministic` they give the same bits in every run. Call it after accelerate is set up, which changes
    the arithmetic in some configurations, and before the first matrix product, which reads the environment variable.
    """
    deterministic = params.deterministic
    set_arithmetic(tf32=params.precision == "tf32", search=not deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports the compiler, for a second
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)  # its backward pass adds in any order
    if deterministic:
        os.environ[CUBLAS] = ":4096:8"


def unsupported(kind: str) -> StageError:
    """Return the error for a configuration of accelerate that training does not support."""
    return StageError(
        f"accelerate is configured for {kind}, which training does not support; use a configuration like those in "
        "infra/accelerate: infra/accelerate/fsdp.yaml shards a network that is too large for one device"
    )


def _check_devices(params: TrainParams, processes: int) -> None:
    on_this_machine, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if params.precision == "fp16" and not gpus:
        raise StageError("train.precision 'fp16' needs a GPU; use 'bf16' or 'no'")
    if processes > 1 and on_this_machine > gpus and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise StageError(
            f"{on_this_machine} processes were started on a machine with {gpus} GPUs; lower num_processes in the "
            "configuration of accelerate, or set ACCELERATE_USE_CPU=true to train on the CPU"
        )

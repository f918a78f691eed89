"""A stand-in for a GPU on a CPU build of PyTorch, for code whose tensors are on the device "cuda".

Tensors of the CPU are real. Those of "cuda" have shape, dtype and device, and no values (`FakeTensor`): operators on
them check and compute these three. What a GPU refuses is refused, such as operators on tensors of two devices. A value
that is read from "cuda" is 1, and everything that makes the host wait for a GPU is counted.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.support.fake_autocast import patch_autocast

aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
COPIES = (aten._to_copy, aten.copy_)
READS = (aten._local_scalar_dense, aten.equal, aten.is_nonzero)
GPU, LAZY = 1, 17
"""Numbers of the kinds of devices in <torch/headeronly/core/DeviceType.h>."""
MEMORY = 80 * 2**30


class Operators(FakeTensorMode):
    """The operators themselves: shapes, dtypes and devices of their results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = torch.device("cuda", 0)
        return super().__torch_dispatch__(func, types, args, kwargs)


class FakeCuda(TorchDispatchMode):
    """The operators of the device "cuda"; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = Operators()
        self.waits: list[str] = []
        """Operator and place in our code of each call that made the host wait."""
        self.generators: list[torch.Generator] = []
        """Those that were made for "cuda"; they are of the CPU."""
        self.pinned: dict[int, torch.UntypedStorage] = {}
        """Storages of pinned memory by their address; held, so that no address occurs twice."""

    def waits_during(self, call: Callable[[], object]) -> list[str]:
        """Return the waits of the host in a call."""
        before = len(self.waits)
        call()
        return self.waits[before:]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Record that a tensor of the CPU lies in pinned memory."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage
        return tensor

    def __torch_dispatch__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        here = any(isinstance(leaf, FakeTensor) or _is_gpu(leaf) for leaf in leaves)
        self._check_generator(leaves, here)
        if not here:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func._can_decompose():  # in inference mode PyTorch leaves that to the mode
            with self:
                return func.decompose(*args, **kwargs)
        packet = func.overloadpacket
        if packet in READS:
            return self._read(func, args[0])
        if packet in PRODUCTS and len(dtypes := {leaf.dtype for leaf in leaves if isinstance(leaf, FakeTensor)}) > 1:
            raise RuntimeError(f"expected the arguments of {func} to have the same dtype, but got {dtypes}")
        if packet in INDEXING:
            self._check_indices(func, args[0], args[1])
        if packet in COPIES:
            self._count_copy(func, args, kwargs)
        if packet is aten.copy_ and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return args[0].copy_(torch.ones(args[1].shape, dtype=args[1].dtype))
        args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
        return tree_map_only(FakeTensor, _real_on_the_cpu, func(*args, **kwargs))

    def _check_generator(self, leaves: list[Any], here: bool) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch._C.Generator) and (leaf in self.generators) != here:
                raise RuntimeError(f"the generator is not of the device {'cuda' if here else 'cpu'} of the operator")

    def _read(self, func: Any, tensor: torch.Tensor) -> bool | int | float:
        self._waited(func)
        if func.overloadpacket is not aten._local_scalar_dense or tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() else 1

    def _check_indices(self, func: Any, tensor: torch.Tensor, indices: Any) -> None:
        used = [index for index in indices if index is not None]
        if not isinstance(tensor, FakeTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(not isinstance(index, FakeTensor) for index in used):
            self._waited(func)  # the indices are copied to the GPU
        if any(index.dtype in (torch.bool, torch.uint8) for index in used):
            self._waited(func)  # their number is read

    def _count_copy(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Count a copy between the devices, unless it is one from or to pinned memory for which the host goes on."""
        if func.overloadpacket is aten.copy_:
            target, source, blocks = args[0], args[1], not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            crosses = isinstance(target, FakeTensor) != isinstance(source, FakeTensor)
            crosses = crosses and not source.dim() == 0 < target.dim()  # a number, which the GPU fills in
            on_host = source if isinstance(target, FakeTensor) else target
        else:
            source, blocks, on_host = args[0], not kwargs.get("non_blocking"), args[0]
            crosses = _is_gpu(kwargs.get("device") or source.device) != isinstance(source, FakeTensor)
            blocks = blocks or isinstance(source, FakeTensor)  # a new tensor on the host: its values are read
        if crosses and (blocks or on_host.untyped_storage().data_ptr() not in self.pinned):
            self._waited(func)

    def _waited(self, func: Any) -> None:
        ours = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        place = next((frame for frame in reversed(ours) if frame.filename != __file__), ours[-1])
        self.waits.append(f"{func} in {Path(place.filename).name}:{place.lineno}")


def _is_gpu(device: object) -> bool:
    """Whether it is "cuda", or "meta", which PyTorch's C++ code takes it for, so that its autograd needs no GPU."""
    return isinstance(device, torch.device) and device.type in ("cuda", "meta")


def _as_seen(device: str | torch.device) -> torch.device:
    """Return the device that PyTorch's C++ code takes a device for, see `_is_gpu`."""
    return torch.device("meta") if torch.device(device).type == "cuda" else torch.device(device)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor of the CPU by one that an operator of "cuda" takes."""
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _real_on_the_cpu(tensor: FakeTensor) -> torch.Tensor:
    """Replace what was copied from "cuda" to the CPU by a tensor of ones there."""
    if tensor.device.type != "cpu":
        return tensor
    with unset_fake_temporarily():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).fill_(1)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Give PyTorch the device "cuda" within the block.

    Code in other threads must not call its operators, and published networks must be loaded before: that uses "meta".
    """
    fake = FakeCuda()
    with pytest.MonkeyPatch.context() as patch, _device_guard():
        _patch_cuda(patch)
        _patch_host(patch, fake)
        _patch_tensors(patch)
        patch_autocast(patch)
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies a tensor of the CPU
        try:
            with fake.operators, fake:
                yield fake
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)


@contextmanager
def _device_guard() -> Iterator[None]:
    """Register what selects the current device of a thread, which operators call even on tensors without values.

    A CPU build has none for "cuda". PyTorch has one that does nothing, and registers it in place of one that counts no
    device, as that of lazy tensors does.
    """
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not path.is_file():
        pytest.skip("the stand-in for a GPU needs PyTorch for Linux")
    guards = (ctypes.c_void_p * (LAZY + 1)).in_dll(ctypes.CDLL(str(path)), "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[GPU]
    if before is None:
        guards[GPU] = guards[LAZY]
        torch._C._ensureCUDADeviceGuardSet()
    try:
        yield
    finally:
        guards[GPU] = before


def _patch_cuda(patch: pytest.MonkeyPatch) -> None:
    """Let `torch.cuda` describe one GPU."""

    def done(*_: object, **__: object) -> None: ...

    class Event:
        record = synchronize = wait = done

    device = SimpleNamespace(total_memory=MEMORY, major=9, minor=0, name="a GPU", multi_processor_count=132)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "get_device_name": "a GPU",
        "get_device_capability": (9, 0),
        "get_device_properties": device,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "current_stream": SimpleNamespace(device_index=0),
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    ignored = ("_lazy_init", "_lazy_call", "set_device", "synchronize", "reset_peak_memory_stats", "empty_cache")
    for name in (*ignored, "set_rng_state", "get_rng_state"):
        patch.setattr(torch.cuda, name, done)
    patch.setattr(torch.cuda, "Event", Event)


def _patch_host(patch: pytest.MonkeyPatch, fake: FakeCuda) -> None:
    """Let the CPU have pinned memory, and generators of both devices."""
    empty = torch.empty

    def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*shape, **options)
        return fake.pin(made) if pin_memory else made

    patch.setattr(torch, "empty", pinned)
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: fake.pin(tensor.clone()))
    patch.setattr(torch, "Generator", _generators(fake))


def _generators(fake: FakeCuda) -> type:
    """Return what takes the place of `torch.Generator`."""

    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, torch._C.Generator)

    class Generator(metaclass=Kind):
        def __new__(cls, device: str | torch.device = "cpu") -> torch.Generator:
            made = torch._C.Generator().clone_state()  # one that is the same object wherever it is passed on
            if torch.device(device).type == "cuda":
                fake.generators.append(made)
            return made

    return Generator


def _patch_tensors(patch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's C++ code see the device "meta" of tensors without values, and Python code the device "cuda"."""
    make = torch.Tensor._make_subclass

    def made(cls: type, values: torch.Tensor, *options: Any, dispatch_device: bool = False, **more: Any) -> Any:
        return make(cls, values, *options, dispatch_device=dispatch_device and cls is not FakeTensor, **more)

    moved = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Return the same tensor if it is on "cuda" already."""
        if isinstance(tensor, FakeTensor):
            args, options = tree_map_only((str, torch.device), _as_seen, (args, options))
        return moved(tensor, *args, **options)

    def replace_data(tensor: torch.Tensor, other: torch.Tensor) -> None:
        tensor.data = other  # as a module does with tensors that have values

    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(torch.utils, "swap_tensors", replace_data)
    patch.setattr(torch.Tensor, "_make_subclass", made)
    patch.setattr(FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda"), raising=False)

"""Counts the calls of a training that make the host wait for a GPU; the training itself may run on a CPU."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchFunctionMode):
    """Count the calls that make the host wait for a GPU: reading a value, or copying to the host.

    `numpy` is not among them: it refuses a tensor on a GPU.
    """

    CALLS = ("cpu", "tolist")
    OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count, outer = 0, self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                outer.count += func._schema.name in outer.OPERATORS
                return func(*args, **kwargs or {})

        self.operators = Operators()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.CALLS
        return func(*args, **kwargs or {})

    def during(self, call) -> int:
        before = self.count
        with self, self.operators:
            call()
        return self.count - before

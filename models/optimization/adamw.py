"""AdamW (Loshchilov & Hutter 2019) by PyTorch's fused kernel, without importing torch._dynamo.

`torch.optim.AdamW` has the same kernel and the same state, but its first step imports PyTorch's compiler, which takes
as long as importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

Group: TypeAlias = dict[str, Any]  # options of several types, as in torch.optim
T = TypeVar("T")

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""The defaults of `torch.optim.AdamW`."""
MARKED = (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict)
"""Methods that import torch._dynamo on their first call, to exclude themselves from compilation."""


def leave_out_dynamo(functions: Iterable[Callable[..., Any] | None]) -> None:
    """Keep functions that PyTorch excludes from compilation from importing its compiler; None is left out.

    On its first call each stores what it calls from then on as an attribute; here that is the function itself, so no
    code of ours may compile a call of it. The attribute is not part of PyTorch's interface: a version without it
    imports torch._dynamo.
    """
    for function in functions:
        if original := getattr(function, "__wrapped__", None):
            original.__dynamo_disable = original


class AdamW(Optimizer):
    """AdamW with the default moments; the state is `exp_avg`, `exp_avg_sq` and `step`.

    Args:
        parameters: Tensors, or groups with options of their own as in torch.optim.
        lr: Learning rate.
        weight_decay: Decoupled from the gradient.
    """

    _step_supports_amp_scaling = True
    """The gradient scaler of fp16 sets `grad_scale` and `found_inf` and always makes the step; the kernel leaves it out
    if a gradient overflowed. Without this the scaler waits for the device at every step."""

    def __init__(self, parameters: Iterable[Tensor] | Iterable[Group], lr: float, weight_decay: float) -> None:
        leave_out_dynamo(MARKED)
        # With `fused`, `load_state_dict` keeps `step` in float32 on the device.
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "fused": True})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], T]) -> T: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None) -> T | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Called first, with gradients enabled, if it is given.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(group, parameters, [parameter.grad for parameter in parameters])
        return loss

    def update(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Update, in place, the parameters of a group that have a gradient."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        adamw(
            parameters,
            gradients,
            self.state_of(parameters, "exp_avg"),
            self.state_of(parameters, "exp_avg_sq"),
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=EPSILON,
            maximize=False,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )

    def state_of(self, parameters: Sequence[Tensor], key: str) -> list[Tensor]:
        """Return the state `key` of each parameter; it starts as zeros in the parameter's memory format."""
        for parameter in parameters:
            if key not in self.state[parameter]:
                self.state[parameter][key] = torch.zeros_like(parameter)
        return [self.state[parameter][key] for parameter in parameters]

"""Muon (Jordan et al. 2024) for the hidden matrices of a network, and AdamW for its other parameters, as one optimizer.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
https://kellerjordan.github.io/posts/muon/. `torch.optim.Muon` takes parameters of two dimensions only; here a
convolution is the matrix [out, in * kernel height * kernel width].

Legend: m x n a matrix, B the momentum, O the orthogonalised update.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.optimization import sharding
from models.optimization.adamw import AdamW, Group
from models.parallel import Workers

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the Newton-Schulz iteration (Jordan et al. 2024): singular values end between 0.7 and 1.2."""
ITERATIONS = 5
LEAST_MATRICES = 8
"""Matrices per thread of a CPU; with fewer, starting the thread takes as long as it saves."""
SMALLEST_NORM = 1e-7
"""Matrices with a smaller Frobenius norm are scaled by its inverse only, so that a gradient of zero stays zero."""
INPUTS_AND_OUTPUTS = re.compile(
    r"conv_in|conv_out|pos_embed\.proj|proj_out(_\d)?|caption_projection\.linear_1|(.*\.)?\w*embed(ding|der)\.linear_1"
    r"|control\.(conv_in|controlnet_.*)"
)
"""Layers that read what the network is given or write what it predicts, by the names of diffusers: of a U-Net, of a
transformer (patches, modulation of the output), and the first layer of the embedding of timestep, size or text. Of a
ControlNet, the layers that read the control map, and the convolutions that start at zero and write its outputs."""
MUON, ADAMW = "muon", "adamw"
"""Values of a parameter group's `algorithm`."""


def hidden_matrices(network: nn.Module) -> list[str]:
    """Return the names of the parameters that Muon trains: weights of the hidden linear layers and convolutions.

    The remaining ones are biases, norms, embeddings and other tables, `INPUTS_AND_OUTPUTS`, parameters that are frozen,
    and LoRA adapters: orthogonalising each of the factors B and A does not orthogonalise the change of their product,
    which depends on how it is factorised, and the learning rates known for adapters are Adam's.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, kinds)
        and module.weight.requires_grad
        and not INPUTS_AND_OUTPUTS.fullmatch(name)
        and ".lora_" not in name
    ]


class MuonWithAdamW(AdamW):
    """Muon for the `hidden_matrices` of a network, fused AdamW (Loshchilov & Hutter 2019) for its other parameters.

    Muon, with the gradient G of a matrix W [m, n]:

        B <- momentum B + (1 - momentum) G
        O <- orthogonalize((1 - momentum) G + momentum B)                      (Nesterov)
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, m / n)) O

    The factor sqrt(max(1, m / n)) is that of the authors, `adjust_lr_fn="original"` of `torch.optim.Muon`. A gradient's
    scale does not matter, so neither does the clipping of its norm.

    Both kinds of parameters are groups of one optimizer, because a gradient scaler and accelerate treat each optimizer
    as a step of its own. The group of Muon comes first. The state has one tensor per parameter and quantity, in the
    parameter's shape: `momentum_buffer`, or `exp_avg`, `exp_avg_sq` and `step`. It is sharded like the parameter by
    FSDP2 (`fully_shard`); every process then orthogonalizes the whole of each matrix.

    Args:
        network: Its parameters are trained.
        lr: Learning rate of Muon, and `adamw_lr` that of AdamW.
        momentum: Of Muon, in [0, 1).
        weight_decay: Of both.

    Raises:
        ValueError: if no parameter qualifies for Muon.
    """

    _step_supports_amp_scaling = False
    """Muon's part of a step cannot be left out on the device, so the scaler makes no step that overflows."""

    def __init__(self, network: nn.Module, lr: float, adamw_lr: float, momentum: float, weight_decay: float) -> None:
        names = set(hidden_matrices(network))
        if not names:
            raise ValueError("no trained parameter is a hidden matrix, which Muon needs; train this network with AdamW")
        hidden = [parameter for name, parameter in network.named_parameters() if name in names]
        others = [parameter for name, parameter in network.named_parameters() if name not in names]
        groups: list[Group] = [
            {"params": hidden, "algorithm": MUON, "lr": lr, "momentum": momentum},
            {"params": others, "algorithm": ADAMW, "lr": adamw_lr},
        ]
        super().__init__(groups, lr=adamw_lr, weight_decay=weight_decay)

    def update(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Update, in place, the parameters of a group that have a gradient, by the group's `algorithm`."""
        (self._muon if group["algorithm"] == MUON else super().update)(group, parameters, gradients)

    def _muon(self, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Divide the matrices among the threads of a CPU: operators on matrices this small gain nothing from two."""
        buffers = self.state_of(parameters, "momentum_buffer")

        @torch.no_grad()
        def update(part: list[int]) -> None:
            _update(group, *([tensors[index] for index in part] for tensors in (parameters, gradients, buffers)))

        parts = _shares(parameters)
        with Workers(len(parts)) as threads:
            threads.map(update, parts)


def _shares(parameters: list[Tensor]) -> list[list[int]]:
    """Return which matrices each thread updates; matrices of all sizes are dealt out in turns."""
    first, count = parameters[0], len(parameters)
    alone = first.device.type != "cpu" or sharding.is_sharded(first)  # processes exchange matrices in one order
    threads = 1 if alone else max(1, min(torch.get_num_threads(), count // LEAST_MATRICES))
    largest_first = sorted(range(count), key=lambda index: -parameters[index].numel())
    return [largest_first[number::threads] for number in range(threads)]


def _update(group: Group, parameters: list[Tensor], gradients: list[Tensor], buffers: list[Tensor]) -> None:
    """Make a step of Muon, in place, with the parameters of a group, their gradients and their momenta."""
    lr, momentum = group["lr"], group["momentum"]
    torch._foreach_lerp_(buffers, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, buffers, momentum)
    torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    matrices = orthogonalize([sharding.whole(update).flatten(1) for update in updates])
    steps = [matrix * -(lr * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))) for matrix in matrices]
    torch._foreach_add_(
        parameters, [sharding.like(p, step.reshape(p.shape)) for step, p in zip(steps, parameters, strict=True)]
    )


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return about U V^T of each matrix U S V^T, by five Newton-Schulz iterations (Jordan et al. 2024).

    X <- A X + B (X X^T) X + C (X X^T)^2 X, from X = matrix / (its Frobenius norm), transposed if it has more rows than
    columns. Every iterate is Q X_0 with a polynomial Q of the Gram matrix G = X_0 X_0^T [m, m], and polynomials of G
    commute, so with P = A + B G + C G^2 the same iteration is

        Q <- P Q,  G <- P G P,

    and the result Q X_0. Only the first and the last product have the long side of a convolution, and matrices of any
    length with the same m go through one chain of batched products. In float32 this costs half of the plain iteration
    with one batch per shape, and a third of that in bfloat16, on a CPU with bfloat16 instructions (digits network, 60
    matrices). It needs all of float32: an error in a small eigenvalue of G grows by up to A^2 per iteration.

    Args:
        matrices: [m, n] each, of any shapes.

    Returns:
        float32 matrices of the same shapes.
    """
    wide = [matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().mT for matrix in matrices]
    by_rows: dict[int, list[int]] = defaultdict(list)
    for index, matrix in enumerate(wide):
        by_rows[matrix.shape[0]].append(index)
    results = list(wide)
    for indices in by_rows.values():
        factors = _newton_schulz(torch.stack([wide[index] @ wide[index].mT for index in indices]))
        for index, factor in zip(indices, factors, strict=True):
            result = factor @ wide[index]
            results[index] = result if matrices[index].shape == result.shape else result.mT
    return results


def _newton_schulz(gram: Tensor) -> Tensor:
    """Return Q, with which the result is Q X, from the Gram matrices X X^T, both float32 [batch, m, m]."""
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=SMALLEST_NORM**2)[:, None, None]
    gram = gram / squared_norm
    constant = A * torch.eye(gram.shape[1], device=gram.device)
    q = squared_norm.rsqrt()  # X_0 = q X
    for iteration in range(ITERATIONS):
        p = torch.baddbmm(gram, gram, gram, beta=B, alpha=C).add_(constant)
        q = p @ q if iteration else p * q
        if iteration < ITERATIONS - 1:
            gram = p @ gram @ p
    return q

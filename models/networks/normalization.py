"""Group normalization that is fast in NHWC: in compiled networks on a GPU, and in bfloat16 on a CPU.

On a GPU `F.group_norm` copies its input to NCHW, and its output is in NCHW: between two convolutions in NHWC the
activations are rearranged twice per pass, and the compiler cannot fuse the copies away.

On a CPU PyTorch's kernel for bfloat16 in NHWC takes 5 to 8 times as long as that for float32, forward and backward; the
conversion costs much less. Autocast on a GPU computes group norms in float32 too.

Legend: x float [B, C, H, W], G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize groups of channels (Wu & He 2018, eq. 1-6) in operators that keep the memory format and can be fused.

    Statistics and output are float32; a following SiLU and the conversion for a convolution then run in the kernel that
    applies the statistics.
    """
    grouped = x.float().unflatten(1, (groups, -1))  # a view in every memory format
    variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0, keepdim=True)
    normalized = ((grouped - mean) * torch.rsqrt(variance + eps)).flatten(1, 2)
    return normalized * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that computes `group_norm` while torch.compile traces it on a GPU in NHWC.

    Within autocast on a CPU the output is float32, as it is on a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and torch.is_autocast_enabled("cpu"):  # FSDP2 gathers the parameters in bfloat16 as well
            return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        if not (torch.compiler.is_compiling() and x.is_cuda) or torch.compiler.is_exporting():
            return super().forward(x)
        if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        normalized = group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return normalized if torch.is_autocast_enabled("cuda") else normalized.to(x.dtype)


def replace_group_norms(network: nn.Module) -> None:
    """Make the group norms of a network of diffusers `GroupNorm`s, in place; their parameters stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = GroupNorm

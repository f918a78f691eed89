"""Attention maps of a network, recorded by hooks: ours, our transformers, and every network of diffusers' `Attention`.

`torch.nn.functional.scaled_dot_product_attention` returns no weights, so they are computed again from the queries and
keys of each layer: softmax(q k^T / sqrt(d)) (Vaswani et al. 2017, eq. 1), averaged over the heads as in Tang et al.
2023, section 3.1. The hooks only read, so the network's output keeps every bit, and they exist only within `recording`.

Legend: B batch, N positions of the image, M keys (positions, or tokens of the text), h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from models.networks.transformer import rotate

if TYPE_CHECKING:
    from torch import Tensor, nn

PARTS = ("to_q", "to_k")
"""Layers that every attention module has, ours and diffusers'."""
CONTEXTS = ("context", "encoder_hidden_states")
"""Names of the argument with the text, in our modules and in diffusers'."""


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one layer in one evaluation of the network, averaged over its heads."""

    layer: str
    """Name of the module, such as "mid_block.attentions.0"."""
    cross: bool
    """Whether the keys are tokens of the text."""
    grid: tuple[int, int]
    """Rows and columns of the N positions."""
    weights: Tensor
    """float32 on the CPU. Self-attention of one position, [B, N]; cross-attention of all positions, [B, N, M]."""


@dataclass
class Recorder:
    """The maps that `recording` has collected, in the order in which the layers ran."""

    maps: list[AttentionMap] = field(default_factory=list)
    aspect: tuple[int, int] = (1, 1)
    """Height and width of the network's input."""
    pending: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """Queries and keys [B, N or M, h d] of a layer that is running."""

    def self_attention(self) -> list[AttentionMap]:
        """Return the maps of positions that attend to positions."""
        return [each for each in self.maps if not each.cross]

    def cross_attention(self) -> list[AttentionMap]:
        """Return the maps of positions that attend to the text."""
        return [each for each in self.maps if each.cross]


def attention_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of a network by their name: those with `heads`, `to_q` and `to_k`."""
    return {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "heads") and all(hasattr(module, part) for part in PARTS)
    }


@contextmanager
def recording(network: nn.Module) -> Iterator[Recorder]:
    """Record the attention of every evaluation of `network` within the block; no hook is left after it.

    Self-attention is that of the position at the centre (row H // 2, column W // 2). The network must not be evaluated
    by several threads at once. Layers that diffusers has fused (`fuse_projections`) are not recorded.
    """
    recorder = Recorder()
    with ExitStack() as hooks:

        def attach(handle: torch.utils.hooks.RemovableHandle) -> None:
            hooks.callback(handle.remove)

        attach(network.register_forward_pre_hook(lambda _, args: _remember_shape(recorder, args)))
        for name, layer in attention_layers(network).items():
            for part in PARTS:
                attach(getattr(layer, part).register_forward_hook(_keep(recorder, (name, part))))
            attach(layer.register_forward_hook(_record(recorder, name), with_kwargs=True))
        yield recorder


def _remember_shape(recorder: Recorder, args: Sequence[Any]) -> None:
    recorder.aspect = (args[0].shape[-2], args[0].shape[-1])


def _keep(recorder: Recorder, key: tuple[str, str]) -> Any:
    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        recorder.pending[key] = output

    return hook


def _record(recorder: Recorder, name: str) -> Any:
    def hook(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], _: object) -> None:
        queries, keys = (recorder.pending.pop((name, part), None) for part in PARTS)
        if queries is None or keys is None:
            return
        heads = int(getattr(layer, "heads"))  # noqa: B009 (the type of a module's attribute is not known)
        with torch.no_grad():
            q, k = _normalised(layer, _by_head(queries, heads), _by_head(keys, heads), args, kwargs)
            recorder.maps.append(_map(name, q, k, _is_cross(args, kwargs), recorder.aspect))

    return hook


def _by_head(projected: Tensor, heads: int) -> Tensor:
    """[B, N, h d] -> [B, h, N, d]."""
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)


def _is_cross(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    context = args[1] if len(args) > 1 else next((kwargs[name] for name in CONTEXTS if name in kwargs), None)
    return context is not None


def _normalised(
    layer: nn.Module, q: Tensor, k: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Apply the normalisation and rotation that a layer may have between projection and product."""
    norms = [getattr(layer, name, None) for name in ("norm_q", "norm_k")]
    if norms[0] is not None and norms[1] is not None:
        q, k = norms[0](q.float()), norms[1](k.float())
    rotation = kwargs.get("rotation", args[2] if len(args) > 2 else None)
    if isinstance(rotation, torch.Tensor):
        q, k = rotate(q, rotation), rotate(k, rotation)
    return q, k


def _map(name: str, q: Tensor, k: Tensor, cross: bool, aspect: tuple[int, int]) -> AttentionMap:
    """Compute the map from queries [B, h, N, d] and keys [B, h, M, d]."""
    rows = max(1, round((q.shape[2] * aspect[0] / aspect[1]) ** 0.5))
    grid = (rows, q.shape[2] // rows)
    if not cross:
        centre = grid[0] // 2 * grid[1] + grid[1] // 2
        q = q[:, :, centre : centre + 1]
    weights = torch.softmax(q.float() * q.shape[3] ** -0.5 @ k.float().transpose(2, 3), dim=3).mean(dim=1)
    return AttentionMap(name, cross, grid, (weights if cross else weights[:, 0]).cpu())

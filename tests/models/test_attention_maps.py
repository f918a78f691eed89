"""Attention maps: the recorder changes no output, leaves no hook, and gives the weights of the formula."""

from __future__ import annotations

import pytest
import torch

from models.attention_maps import attention_layers, recording
from models.networks.dit import DiT, DiTConfig
from models.networks.text_dit import TextDiT, TextDiTConfig
from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.unet import UNet, UNetConfig
from tests.support.networks import randomised

SHARED = {"size": 8, "channels": 2, "patch_size": 2, "width": 16, "depth": 2, "heads": 2}
EXTRAS = {"qk_norm": True, "rope": True}
TEXT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2])


def unet() -> torch.nn.Module:
    return randomised(UNet(UNetConfig(8, 2, (8, 16), (False, True), 1, 4, 8, conditions=4)))


def text_unet() -> torch.nn.Module:
    return randomised(TextUNet(TextUNetConfig(8, 2, 12, (8, 16), (True, True), 1, 4, attention_head_dim=4)))


def dit(**extras: object) -> torch.nn.Module:
    return randomised(DiT(DiTConfig(**SHARED, conditions=4, **extras)))


def text_dit(**extras: object) -> torch.nn.Module:
    return randomised(TextDiT(TextDiTConfig(**SHARED, text_width=12, **extras)))


CASES = {
    "unet": (unet, LABELS),
    "dit": (dit, LABELS),
    "dit-rope": (lambda: dit(**EXTRAS), LABELS),
    "text-unet": (text_unet, TEXT),
    "text-dit": (text_dit, TEXT),
}


def hooks(network: torch.nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in network.modules())


@pytest.mark.parametrize("case", CASES)
def test_recording_keeps_every_bit_and_leaves_no_hook(case: str) -> None:
    build, condition = CASES[case]
    network = build()
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 7])
    with torch.inference_mode():
        expected = network(x, t, condition)
        with recording(network) as recorder:
            assert hooks(network) > 0
            observed = network(x, t, condition)
        assert hooks(network) == 0
        assert torch.equal(network(x, t, condition), expected)
    assert torch.equal(observed, expected)
    assert len(recorder.maps) == len(attention_layers(network)) > 0
    assert not recorder.pending
    for each in recorder.maps:
        rows, columns = each.grid
        assert rows == columns
        sizes = (2, rows * columns, 5) if each.cross else (2, rows * columns)
        assert each.weights.shape == sizes and each.weights.dtype == torch.float32
        assert torch.allclose(each.weights.sum(dim=-1), torch.ones(sizes[:-1]), atol=1e-5)
    assert bool(recorder.cross_attention()) == case.startswith("text")


def test_a_hook_is_removed_after_an_error_too() -> None:
    network = unet()
    with pytest.raises(ValueError, match="stop"), recording(network):
        raise ValueError("stop")
    assert hooks(network) == 0


def explicit(network: torch.nn.Module, x: torch.Tensor, condition: torch.Tensor, monkeypatch) -> list[torch.Tensor]:
    """The weights of every layer, from the queries and keys that our networks hand to `attend`."""
    found = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[3] ** 0.5, dim=3)
        found.append(weights.mean(dim=1))
        return weights @ v

    for module in ("unet", "transformer", "text_unet"):
        monkeypatch.setattr(f"models.networks.{module}.attend", spy)
    network(x, torch.tensor([3, 7]), condition)
    return found


@pytest.mark.parametrize("case", CASES)
def test_maps_are_the_weights_that_the_network_uses(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, condition = CASES[case]
    network, x = build(), torch.randn(2, 2, 8, 8)
    with torch.inference_mode():
        with recording(network) as recorder:
            network(x, torch.tensor([3, 7]), condition)
        for each, weights in zip(recorder.maps, explicit(network, x, condition, monkeypatch), strict=True):
            rows, columns = each.grid
            centre = rows // 2 * columns + columns // 2
            assert torch.allclose(each.weights, weights if each.cross else weights[:, centre], atol=1e-5), each.layer


def test_diffusers_own_processors_are_recorded() -> None:
    from diffusers import UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    plain = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    conditional = UNet2DConditionModel(
        sample_size=(8, 16),
        in_channels=2,
        out_channels=2,
        cross_attention_dim=12,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
    ).eval()
    with torch.inference_mode():
        for network, shape, more in ((plain, (2, 2, 8, 8), ()), (conditional, (2, 2, 8, 16), (TEXT,))):
            x = torch.randn(shape)
            expected = network(x, 5, *more).sample
            with recording(network) as recorder:
                assert torch.equal(network(x, 5, *more).sample, expected)
            assert len(recorder.maps) == len(attention_layers(network)) > 0
            assert {each.grid for each in recorder.maps} == {(4, 4 * shape[3] // shape[2])}
            assert bool(recorder.cross_attention()) == bool(more)

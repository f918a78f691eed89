"""Our U-Net and diffusers' `UNet2DModel`: the same weights, the same output."""

import pytest
import torch

from models.unet import UNet, UNetConfig

DIGITS = UNetConfig(16, 1, (16, 32, 64), (False, False, True), 1, 8, 8, conditions=11)
EMBEDDED = UNetConfig(16, 1, (16, 32, 64), (False, False, True), 1, 8, 8, embedded=True)
RGB = UNetConfig(16, 3, (16, 32), (True, False), 2, 4, None)
CIFAR_PAPER = UNetConfig(32, 3, (128, 256, 256, 256), (False, True, False, False), 2, 32, None)


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: what starts at zero could hide a difference."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def condition_for(config: UNetConfig) -> torch.Tensor | None:
    if config.embedded:
        return torch.randn(3, 4 * config.block_out_channels[0])
    return torch.tensor([0, 5, 10]) if config.conditions else None


@pytest.mark.parametrize("config", [DIGITS, EMBEDDED, RGB], ids=["label", "embedding", "unconditional"])
@pytest.mark.parametrize("direction", ["ours to diffusers", "diffusers to ours"])
def test_same_output_as_diffusers(config, direction):
    from diffusers import UNet2DModel

    ours, theirs = UNet(config), UNet2DModel.from_config(config.to_diffusers())
    source, destination = (ours, theirs) if direction.startswith("ours") else (theirs, ours)
    destination.load_state_dict(randomised(source).state_dict())
    x, t, condition = torch.randn(3, config.channels, 16, 16), torch.tensor([0, 500, 999]), condition_for(config)
    with torch.inference_mode():
        difference = ours.eval()(x, t, condition) - theirs.eval()(x, t, class_labels=condition).sample
        assert ours(x, t, condition).abs().mean() > 1e-2
    assert difference.abs().max() < 1e-5


def test_parameters_of_the_paper():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(CIFAR_PAPER).parameters()) == 35_746_307


@pytest.mark.parametrize("config", [DIGITS, EMBEDDED, CIFAR_PAPER])
def test_config_survives_the_round_trip(config):
    assert UNetConfig.from_diffusers(config.to_diffusers()) == config


def test_untrained_network_predicts_zero():
    output = UNet(RGB)(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))
    assert output.abs().max() == 0


def test_null_class_differs_from_a_class():
    network = randomised(UNet(DIGITS))
    x, t = torch.randn(1, 1, 16, 16), torch.tensor([10])
    assert not torch.allclose(network(x, t, torch.tensor([3])), network(x, t, torch.tensor([10])))

"""Our U-Net and diffusers' `UNet2DModel`: the same weights, the same output."""

import inspect
import sys
from dataclasses import replace

import pytest
import torch

from models.networks.attention import attend
from models.networks.unet import UNet, UNetConfig
from tests.support.networks import randomised

DIGITS = UNetConfig(16, 1, (16, 32, 64), (False, False, True), 1, 8, 8, conditions=11)
RGB = UNetConfig(16, 3, (16, 32), (True, False), 2, 4, None)
PUBLISHED = replace(RGB, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0)
PATCHES = replace(DIGITS, block_out_channels=(16, 32), attention=(False, True), patch_size=2)
CIFAR_PAPER = UNetConfig(32, 3, (128, 256, 256, 256), (False, True, False, False), 2, 32, None)


def condition_for(config: UNetConfig) -> torch.Tensor | None:
    return torch.tensor([0, 5, 10]) if config.conditions else None


@pytest.mark.parametrize("config", [DIGITS, RGB, PUBLISHED], ids=["label", "unconditional", "published"])
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


def test_patches_are_channels_of_the_network_of_diffusers():
    from diffusers import UNet2DModel

    theirs = UNet2DModel.from_config(PATCHES.to_diffusers())
    ours = UNet(PATCHES)
    theirs.load_state_dict(randomised(ours).state_dict())
    x, t, condition = torch.randn(3, 1, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10])
    patches = torch.stack([x[:, 0, i::2, j::2] for i in range(2) for j in range(2)], dim=1)
    with torch.inference_mode():
        output, expected = ours.eval()(x, t, condition), theirs.eval()(patches, t, class_labels=condition).sample
    for channel, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.allclose(output[:, 0, i::2, j::2], expected[:, channel], atol=1e-5)
    assert output.shape == x.shape


def test_parameters_of_the_paper():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(CIFAR_PAPER).parameters()) == 35_746_307


@pytest.mark.parametrize("config", [DIGITS, CIFAR_PAPER, PUBLISHED, PATCHES])
def test_config_survives_the_round_trip(config):
    assert UNetConfig.from_diffusers(config.to_diffusers()) == config


def test_a_condition_that_is_not_a_class_is_refused():
    """The type "identity", whose condition is an embedding, has the weights of an unconditional network."""
    with pytest.raises(ValueError, match="class_embed_type is 'identity'; supported: None"):
        UNetConfig.from_diffusers(RGB.to_diffusers() | {"class_embed_type": "identity"})


def test_untrained_network_predicts_zero():
    output = UNet(RGB)(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))
    assert output.abs().max() == 0


def test_null_class_differs_from_a_class():
    network = randomised(UNet(DIGITS))
    x, t = torch.randn(1, 1, 16, 16), torch.tensor([10])
    assert not torch.allclose(network(x, t, torch.tensor([3])), network(x, t, torch.tensor([10])))


def gradients(network: UNet, x: torch.Tensor, t: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Gradients of a loss, and the bytes that were kept to compute them."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)  # of dropout
    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(x, t).square().mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in network.parameters()], sum(kept.values())


def test_recomputed_activations_give_the_same_gradients_for_less_memory():
    network = randomised(UNet(replace(RGB, dropout=0.3))).train()
    x, t = torch.randn(8, 3, 16, 16), torch.arange(8)
    plain, kept = gradients(network, x, t)
    network.checkpoint_gradients()
    recomputed, kept_then = gradients(network, x, t)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert kept_then < 0.6 * kept
    assert not torch.equal(plain[0], torch.zeros_like(plain[0]))


def test_channels_last_changes_the_layout_alone():
    network = randomised(UNet(DIGITS))
    x, t, condition = torch.randn(3, 1, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 10])
    with torch.inference_mode():
        expected = network(x, t, condition)
        last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, condition)
    assert torch.allclose(last, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [4, 16, 64, 400])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_of_every_length_has_the_output_and_the_gradient_of_the_formula(tokens, dtype, limit):
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    weigh = torch.randn(2, 3, tokens, 8, dtype=torch.float64)
    scores = torch.einsum("bhqd,bhkd->bhqk", exact[0], exact[1]) / 8**0.5
    wanted = torch.einsum("bhqk,bhkd->bhqd", scores.exp() / scores.exp().sum(3, keepdim=True), exact[2])
    (wanted * weigh).sum().backward()
    output = attend(*inputs)
    (output.double() * weigh).sum().backward()
    assert output.dtype == dtype
    assert (output - wanted).abs().max() < limit
    for ours, theirs in zip(inputs, exact, strict=True):
        assert (ours.grad - theirs.grad).abs().max() < limit * theirs.grad.abs().max()


def test_it_can_be_read_in_one_sitting():
    assert len(inspect.getsource(sys.modules[UNet.__module__]).splitlines()) < 350

"""The ControlNet, without a training: what it starts as, what diffusers makes of it, and published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from models.json_files import read_json, write_json
from models.networks import controlnet
from models.networks.controlnet import ControlledUNet, controlled
from models.networks.network import build
from models.networks.text_unet import TextUNet, TextUNetConfig
from tests.support.networks import randomised

CONFIG = TextUNetConfig(
    size=8,
    channels=2,
    cross_attention_dim=12,
    block_out_channels=(8, 16),
    attention=(False, True),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
    control_widths=(4, 6),
)
SDXL = replace(CONFIG, pooled=20, cross_attention_dim=32, transformer_layers=(1, 2), linear_projection=True)


def inputs(config: TextUNetConfig) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    rows = 6 if config.pooled else 5
    text = torch.randn(2, rows, config.cross_attention_dim)
    return torch.randn(2, 2, 8, 8), torch.tensor([3, 15]), text, torch.rand(2, 3, 16, 16)


@pytest.fixture
def network() -> ControlledUNet:
    found = build(CONFIG)
    assert isinstance(found, ControlledUNet)
    return found


def test_an_untrained_one_changes_nothing_and_the_u_net_is_frozen(network):
    plain = randomised(TextUNet(replace(CONFIG, control_widths=None)))
    network.load_published(plain.state_dict())
    network.eval()
    *first, control = inputs(CONFIG)
    with torch.no_grad():
        assert torch.equal(network(*first, control), plain(*first))
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in network.state_dict() if name.startswith("control.")}
    copied = network.control.state_dict()
    assert all(torch.equal(copied[name], value) for name, value in plain.state_dict().items() if name in copied)
    assert torch.equal(
        copied["mid_block.resnets.0.conv1.weight"], plain.state_dict()["mid_block.resnets.0.conv1.weight"]
    )


@pytest.mark.parametrize("config", [CONFIG, SDXL], ids=["sd", "sdxl"])
def test_it_is_written_as_diffusers_reads_it_and_computes_the_same(config, tmp_path):
    network = randomised(build(config))
    plain, control = controlnet.split(network.state_dict())
    controlnet.save(tmp_path, config, control)
    theirs = ControlNetModel.from_pretrained(tmp_path, local_files_only=True)
    unet = UNet2DConditionModel(**{k: v for k, v in config.to_diffusers().items() if not k.startswith("_")})
    unet.load_state_dict(plain)
    x, t, condition, maps = inputs(config)
    text, added = condition, None
    if config.pooled:
        last = condition[:, -1]
        text, added = condition[:, :-1], {"text_embeds": last[:, :20], "time_ids": last[:, 20:26]}
    with torch.no_grad():
        down, middle = theirs(x, t, text, maps, added_cond_kwargs=added, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        expected = unet.eval()(x, t, text, added_cond_kwargs=added, **residuals).sample
        ours = network(x, t, condition, maps)
        again = controlled(network, controlnet.load(tmp_path, config), x, t, condition, maps)
    assert torch.allclose(ours, expected, atol=1e-4) and torch.allclose(again, expected, atol=1e-4)
    assert (ours - network(x, t, condition)).abs().max() > 1e-3


def test_a_published_one_of_another_u_net_is_refused(tmp_path):
    controlnet.save(tmp_path, CONFIG, controlnet.split(build(CONFIG).state_dict())[1])
    with pytest.raises(ValueError, match=r"made for another U-Net \(cross_attention_dim 12 and not 16\)"):
        controlnet.load(tmp_path, replace(CONFIG, cross_attention_dim=16))
    with pytest.raises(ValueError, match="made for another U-Net"):
        controlnet.load(tmp_path, SDXL)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "conditioning_embedding_out_channels": [4, 8]})
    with pytest.raises(ValueError, match=r"are not those of the ControlNet in its config\.json"):
        controlnet.load(tmp_path, CONFIG)
    write_json(tmp_path / "config.json", {**config, "_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="no ControlNetModel"):
        controlnet.load(tmp_path, CONFIG)


def test_a_frozen_u_net_may_be_narrower_than_what_is_trained(network):
    randomised(network)
    *first, control = inputs(CONFIG)
    with torch.no_grad():
        wide = network(*first, control)
        network.freeze_in(torch.bfloat16)
        narrow = network(*first, control)
    assert narrow.dtype == torch.float32 and network.control.dtype == torch.float32
    assert 0 < (narrow - wide).abs().max() < 0.05 * wide.abs().max()

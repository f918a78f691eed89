"""Merged adapters against diffusers: `load_lora_weights` with `set_adapters`, and `fuse_lora`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.lora import FILE, merge_adapters, read_adapter
from models.networks.text_unet import TextUNet, TextUNetConfig, adapter
from tests.support.networks import randomised

CONFIG = TextUNetConfig(8, 2, 32, (8, 16), (False, True), 1, 4, attention_head_dim=8)
X, T, TEXT = torch.randn(2, 2, 8, 8), torch.tensor([3, 9]), torch.randn(2, 5, 32)


def saved_adapter(folder: Path, targets: list[str], rank: int, alpha: int, old_names: bool) -> Path:
    """Have diffusers save an adapter with random weights for the network of `CONFIG`."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    network = UNet2DConditionModel.from_config(CONFIG.to_diffusers())
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, alpha_pattern={"attn2.to_q": 3 * alpha})
    network.add_adapter(config, "default")
    torch.manual_seed(rank)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    state = get_peft_model_state_dict(network, adapter_name="default")
    state = convert_state_dict_to_diffusers(state) if old_names else state
    metadata = {"unet_lora_adapter_metadata": config.to_dict()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, **metadata)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    first = saved_adapter(root / "first", ["to_q", "to_k", "to_v", "to_out.0"], rank=2, alpha=4, old_names=True)
    return first, saved_adapter(root / "second", ["to_q", "conv1", "proj_in"], rank=3, alpha=3, old_names=False)


@pytest.mark.parametrize("weights", [(0.7, -0.4), (1.0, 0.0)])
def test_two_merged_adapters_are_those_that_diffusers_sets_and_fuses(adapters, weights):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    base = randomised(TextUNet(CONFIG))
    theirs = UNet2DConditionModel.from_config(CONFIG.to_diffusers())
    theirs.load_state_dict(base.state_dict())
    pipeline = StableDiffusionPipeline(None, None, None, theirs, None, None, None, requires_safety_checker=False)
    for name, folder in zip("ab", adapters, strict=True):
        pipeline.load_lora_weights(folder, adapter_name=name)
    pipeline.set_adapters(["a", "b"], list(weights))
    merged = merge_adapters(base.state_dict(), [(read_adapter(f), w) for f, w in zip(adapters, weights, strict=True)])
    ours = TextUNet(CONFIG)
    ours.load_state_dict(merged)
    with torch.no_grad():
        set_, found, plain = theirs(X, T, TEXT).sample, ours(X, T, TEXT), base(X, T, TEXT)
        pipeline.fuse_lora(adapter_names=["a", "b"])
        fused = theirs(X, T, TEXT).sample
    assert (found - plain).abs().max() > 1e-2
    assert (found - set_).abs().max() < 1e-5
    assert (found - fused).abs().max() < 1e-5


def test_an_adapter_of_another_base_is_refused_and_nothing_is_changed(adapters):
    other = TextUNet(TextUNetConfig(8, 2, 16, (8, 16), (False, True), 1, 4, attention_head_dim=8)).state_dict()
    with pytest.raises(ValueError, match=r"does not fit the layer unet\..*: it was made for another base$"):
        merge_adapters(other, [(read_adapter(adapters[0]), 1.0)])


@pytest.mark.parametrize("stored", ["", "text_model."])
@pytest.mark.parametrize("named", ["", "text_model."])
def test_text_encoders_of_every_version_of_transformers_are_changed(tmp_path, stored, named):
    down, up = torch.randn(1, 3), torch.randn(2, 1)
    prefix = f"text_encoder.{named}layers.0.q_proj.lora_"
    save_file({f"{prefix}A.weight": down, f"{prefix}B.weight": up}, tmp_path / FILE)
    adapter, weights = read_adapter(tmp_path), {f"{stored}layers.0.q_proj.weight": torch.ones(2, 3)}
    assert adapter.parts == ["text_encoder"]
    (merged,) = merge_adapters(weights, [(adapter, 0.5)], "text_encoder").values()
    assert torch.allclose(merged, 1 + 0.5 * up @ down)
    assert merge_adapters(weights, [(adapter, 0.5)], "unet") == weights


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "holds no pytorch_lora_weights.safetensors"),
        ({"unet.a.lora_A.bias": torch.zeros(2)}, "holds unet.a.lora_A.bias, which is not part of a plain LoRA"),
        ({"lora_unet_a.alpha": torch.ones(1)}, "convert it with diffusers"),
        (b"no tensors", "is damaged"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_sentence(tmp_path, content, complaint):
    if isinstance(content, bytes):
        (tmp_path / FILE).write_bytes(content)
    elif content:
        save_file(content, tmp_path / FILE)
    with pytest.raises(ValueError, match=complaint):
        read_adapter(tmp_path)


def test_weights_without_an_adapter_do_not_load_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.utils", None)  # its import raises
    assert adapter({"conv_in.weight": torch.zeros(1)}) == {}
    with pytest.raises(ImportError):
        adapter({"mid_block.to_q.lora_A.default.weight": torch.zeros(1)})

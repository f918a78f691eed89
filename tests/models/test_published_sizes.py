"""Networks of Stable Diffusion's sizes have the shapes and the number of parameters of the published ones.

They are built on the meta device. The published `config.json` files are written out here, independently of our code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.autoencoder_training import AutoencoderConfig, build
from models.flops import forward_flops
from models.networks.dit import DiT
from models.networks.text_unet import TextUNet, TextUNetConfig
from models.text_training import TextConfig, text_tower

ROOT = Path(__file__).resolve().parents[2]
FOUR = {"block_out_channels": (320, 640, 1280, 1280), "attention": (True, True, True, False)}
THREE = {"block_out_channels": (320, 640, 1280), "attention": (False, True, True)}
CROSS_FIRST = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
}
OURS = {
    "1.5": {**FOUR, "size": 64, "cross_attention_dim": 768, "heads": 8},
    "2.1": {**FOUR, "size": 96, "cross_attention_dim": 1024, "attention_head_dim": 64, "linear_projection": True},
    "XL": {
        **THREE,
        "size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": 64,
        "linear_projection": True,
        "transformer_layers": (1, 2, 10),
        "pooled": 1280,
    },
}
PUBLISHED = {
    "1.5": {**CROSS_FIRST, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "2.1": {
        **CROSS_FIRST,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "XL": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
PARAMETERS = {"1.5": 859_520_964, "2.1": 865_910_724, "XL": 2_567_463_684}


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", OURS)
def test_the_u_net_has_the_published_size_and_shapes(name):
    from diffusers import UNet2DConditionModel

    config = TextUNetConfig(channels=4, layers_per_block=2, norm_num_groups=32, **OURS[name])
    with torch.device("meta"):
        ours, theirs = TextUNet(config), UNet2DConditionModel(**PUBLISHED[name])
    assert count(ours) == PARAMETERS[name]
    assert shapes(ours) == shapes(theirs)
    assert TextUNetConfig.from_diffusers(dict(theirs.config)) == TextUNetConfig.from_diffusers(config.to_diffusers())
    # The number of heads shapes no weight, so it is compared where it is used.
    heads = [[m.heads for m in network.modules() if hasattr(m, "to_q")] for network in (ours, theirs)]
    assert heads[0] == heads[1]


def test_the_autoencoder_has_the_published_size_and_shapes():
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    with torch.device("meta"):
        ours = build(AutoencoderConfig(channels=3, latent_channels=4, widths=widths, layers_per_block=2))
        theirs = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
    assert count(ours) == 83_653_863
    assert shapes(ours) == shapes(theirs)


class Words:
    """What a network must know of CLIP's tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 49406, 49407, 49407

    def __len__(self) -> int:
        return 49408


@pytest.mark.parametrize(("width", "layers", "parameters"), [(768, 12, 123_060_480), (1280, 32, 693_021_440)])
def test_the_text_encoders_have_the_published_size_and_shapes(width, layers, parameters):
    """CLIP ViT-L/14's, and OpenCLIP ViT-bigG/14's without its projection of 1280 x 1280."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        ours = text_tower(TextConfig(width=width, layers=layers, length=77, words=49408), Words())
        theirs = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                max_position_embeddings=77,
            )
        )
    assert count(ours) == parameters
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(
    ("name", "side", "pooled", "kind"), [("laion_sd", 64, None, "1.5"), ("sdxl_lora", 128, 1280, "XL")]
)
def test_the_presets_make_the_published_networks(name, side, pooled, kind):
    """What a preset says of autoencoder, text encoders and network fits together, and is what its weights are for."""
    from tasks.formats.latents import InputSpec
    from tasks.params import parse
    from tasks.params.composition import compose
    from tasks.training.run import network_config

    params = parse(compose(name, [f"download.path={ROOT / 'tests'}"] if name == "sdxl_lora" else []))
    text = params.codec.text
    assert params.image.resolution == 8 * side == 2 ** (len(params.codec.autoencoder.widths) - 1) * side
    width = text.width + (text.second_width or 0)
    spec = InputSpec(params.codec.autoencoder.latent_channels, side, "text", text_width=width, pooled=pooled)
    config = network_config(spec, params.model.model_copy(update={"lora_rank": None}))
    with torch.device("meta"):
        assert count(TextUNet(config)) == PARAMETERS[kind]


def test_the_preset_of_imagenet_makes_dit_b2_in_the_memory_that_is_documented():
    """Peebles & Xie 2023, tables 1 and 4; the other numbers are those of docs/training.md."""
    from tasks.formats.latents import InputSpec
    from tasks.params import parse
    from tasks.params.composition import compose
    from tasks.training.run import network_config

    params = parse(compose("imagenet_dit_b2", []))
    assert params.image.resolution == 8 * 32 == 2 ** (len(params.codec.autoencoder.widths) - 1) * 32
    config = network_config(InputSpec(params.codec.autoencoder.latent_channels, 32, "label", 1000), params.model)
    with torch.device("meta"):
        network = DiT(config)
        inputs = torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        assert forward_flops(network, *inputs) / 2 == pytest.approx(23.0e9, rel=0.01)
        kept = kept_bytes(network, inputs)
        network.checkpoint_gradients()
        kept_with_checkpoints = kept_bytes(network, inputs)
    assert count(network) == pytest.approx(130.3e6, rel=0.001)
    copies = 1 + 1 + 2 + len(params.train.ema)  # weights, gradients, moments of AdamW, averages
    assert 4 * copies * count(network) == pytest.approx(3.65e9, rel=0.01)
    assert (kept / 2, kept_with_checkpoints / 2) == pytest.approx((229e6, 12e6), rel=0.03)


def test_the_preset_of_the_digits_makes_a_small_transformer():
    from tasks.formats.latents import InputSpec
    from tasks.params import parse
    from tasks.params.composition import compose
    from tasks.training.run import network_config

    params = parse(compose("digits_dit", []))
    with torch.device("meta"):
        network = DiT(network_config(InputSpec(1, params.image.resolution, "label", 10), params.model))
        inputs = torch.zeros(2, 1, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        assert forward_flops(network, *inputs) / 2 == pytest.approx(22.2e6, rel=0.01)
        kept = kept_bytes(network, inputs)
    assert count(network) == pytest.approx(0.478e6, rel=0.001)
    assert kept / 2 == pytest.approx(2.4e6, rel=0.03)


def kept_bytes(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides the parameters."""
    kept: dict[int, torch.Tensor] = {}  # keeps the tensors, so that no two have the same storage
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

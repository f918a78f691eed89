"""Our transformers and diffusers': the same weights, the same output; positions, and the variants diffusers lacks."""

from dataclasses import replace

import pytest
import torch

from models.flops import forward_flops
from models.networks.dit import DiT, DiTConfig
from models.networks.network import build, config_of, load_weights, under_all_names
from models.networks.text_dit import TextDiT, TextDiTConfig
from models.networks.transformer import grid_positions, rotate, rotations
from tests.support.networks import randomised

# DiT-XL/2, scaled down: 3 of 28 blocks, heads of 12 instead of 72
LABELLED = DiTConfig(size=8, channels=4, patch_size=2, width=48, depth=3, heads=4, conditions=11)
PLAIN = DiTConfig(size=8, channels=3, patch_size=4, width=32, depth=2, heads=2)
TEXT = TextDiTConfig(size=8, channels=4, patch_size=2, width=48, depth=3, heads=4, text_width=20)
VARIANTS = [{"qk_norm": True}, {"rope": True}, {"mlp_ratio": 2.0}]
EXTRAS = {"qk_norm": True, "rope": True}
INTEGERS, FLOATS = torch.tensor([0, 500, 999]), torch.tensor([0.0, 417.25, 999.9])
DIT_XL_2_256 = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}
"""The file of facebook/DiT-XL-2-256, whose class has another name today."""
PUBLISHED = {
    "S/2": (384, 12, 6, 33e6, 6.06e9),
    "B/2": (768, 12, 12, 130e6, 23.01e9),
    "L/2": (1024, 24, 16, 458e6, 80.71e9),
    "XL/2": (1152, 28, 16, 675e6, 118.64e9),
}
"""Width, blocks, heads, parameters and multiply-adds of a forward pass (Peebles & Xie 2023, tables 1 and 4)."""


def theirs_of(config, **changes):
    """Diffusers' network; its blocks share one embedding, as in the published weights."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    if isinstance(config, TextDiTConfig):
        return PixArtTransformer2DModel.from_config(config.to_diffusers() | changes)
    network = DiTTransformer2DModel.from_config(config.to_diffusers() | changes)
    for block in network.transformer_blocks:
        block.norm1.emb = network.transformer_blocks[0].norm1.emb
    return network


def condition_of(config):
    """Of three samples; the last class is the null class."""
    if isinstance(config, TextDiTConfig):
        return torch.randn(3, 5, config.text_width)
    return torch.tensor([0, 5, 10]) if config.conditions else None


def drawn_by(theirs, x, t, condition):
    if condition is not None and condition.is_floating_point():
        return theirs(x, encoder_hidden_states=condition, timestep=t).sample
    labels = torch.zeros(len(x), dtype=torch.int64) if condition is None else condition
    return theirs(x, t, class_labels=labels).sample


@pytest.mark.parametrize("t", [INTEGERS, FLOATS], ids=["integers", "floats"])
@pytest.mark.parametrize("config", [LABELLED, PLAIN, TEXT], ids=["label", "unconditional", "text"])
@pytest.mark.parametrize("direction", ["ours to diffusers", "diffusers to ours"])
def test_same_output_as_diffusers(config, direction, t):
    ours, theirs = build(config), theirs_of(config)
    if direction.startswith("ours"):
        theirs.load_state_dict(randomised(ours).state_dict())
    else:
        load_weights(ours, randomised(theirs).state_dict())
    x, condition = torch.randn(3, config.channels, 8, 8), condition_of(config)
    with torch.inference_mode():
        drawn = ours.eval()(x, t, condition)
        difference = drawn - drawn_by(theirs.eval(), x, t, condition)
    assert drawn.abs().mean() > 1e-2
    assert difference.abs().max() < 1e-5


def test_another_aspect_ratio_has_the_positions_of_diffusers():
    ours, theirs = randomised(TextDiT(TEXT)), theirs_of(TEXT)
    theirs.load_state_dict(ours.state_dict())
    x, condition = torch.randn(3, 4, 8, 12), condition_of(TEXT)
    with torch.inference_mode():
        drawn = ours(x, INTEGERS, condition)
        assert (drawn - drawn_by(theirs.eval(), x, INTEGERS, condition)).abs().max() < 1e-5
    assert drawn.shape == x.shape


@pytest.mark.parametrize("config", [LABELLED, TEXT], ids=["label", "text"])
def test_the_learned_variance_of_published_weights_is_ignored(config):
    theirs = randomised(theirs_of(config, out_channels=8))
    ours = build(config_of({**theirs.config, "_class_name": config.to_diffusers()["_class_name"]})).eval()
    assert ours.config == config
    load_weights(ours, theirs.state_dict() | {"pos_embed.pos_embed": torch.zeros(1)})  # as files of old had it
    x, condition = torch.randn(3, 4, 8, 8), condition_of(config)
    with torch.inference_mode():
        wanted = drawn_by(theirs, x, INTEGERS, condition)[:, :4]
        assert (ours(x, INTEGERS, condition) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_operations_of_the_paper(name):
    width, depth, heads, parameters, operations = PUBLISHED[name]
    config = DiTConfig(size=32, channels=8, patch_size=2, width=width, depth=depth, heads=heads, conditions=1001)
    with torch.device("meta"):
        network = DiT(replace(config, channels=4))
        counted = forward_flops(network, torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.02)
    assert counted / 2 == pytest.approx(operations, rel=0.02)


def test_the_published_configuration_is_that_of_the_paper():
    assert config_of(DIT_XL_2_256) == DiTConfig(
        size=32, channels=4, patch_size=2, width=1152, depth=28, heads=16, conditions=1001
    )


@pytest.mark.parametrize("config", [LABELLED, PLAIN, TEXT], ids=["label", "unconditional", "text"])
@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=["plain", "qk-norm", "rope", "mlp-ratio"])
def test_config_survives_the_round_trip(config, variant):
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    config = replace(config, **variant)
    assert config_of(config.to_diffusers()) == config
    known = {kind.__name__ for kind in (DiTTransformer2DModel, PixArtTransformer2DModel)}
    assert (config.to_diffusers()["_class_name"] in known) == (variant == {})


@pytest.mark.parametrize(
    ("config", "change", "sentence"),
    [
        (LABELLED, {"norm_type": "ada_norm"}, "norm_type is 'ada_norm'; supported: 'ada_norm_zero'"),
        (LABELLED, {"out_channels": 5}, "out_channels is 5; supported: None, 4, 8"),
        (LABELLED, {"attention_bias": False}, "attention_bias is False; supported: True"),
        (TEXT, {"cross_attention_dim": 64}, "cross_attention_dim is 64; supported: 48"),
        (TEXT, {"interpolation_scale": None, "sample_size": 128}, "interpolation_scale is 2; supported: 1"),
        (TEXT, {"use_additional_conditions": None, "sample_size": 128}, "use_additional_conditions is True"),
        (TEXT, {"caption_channels": None}, "caption_channels is None; supported: the width of the text embeddings"),
    ],
)
def test_another_architecture_is_refused(config, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_of(config.to_diffusers() | change)


def test_blocks_share_one_embedding_under_every_name():
    network = randomised(DiT(LABELLED))
    once = dict(network.named_parameters())
    assert sum(".norm1.emb." in name for name in once) == 5
    every = under_all_names(network, once)
    assert every.keys() == network.state_dict().keys() and len(every) == len(once) + 5 * 2
    for name, value in network.state_dict().items():
        assert torch.equal(every[name], value), name
    other = dict(network.state_dict())
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    other[name] = other[name] + 1
    with pytest.raises(ValueError, match="embed timestep and class differently"):
        load_weights(DiT(LABELLED), other)
    with pytest.raises(RuntimeError):
        load_weights(DiT(LABELLED), {key: value for key, value in every.items() if key != name})


@pytest.mark.parametrize("config", [LABELLED, PLAIN, TEXT], ids=["label", "unconditional", "text"])
@pytest.mark.parametrize("variant", [{}, EXTRAS], ids=["plain", "extras"])
def test_untrained_network_predicts_zero_and_every_weight_learns(config, variant):
    network = build(replace(config, **variant))
    x, condition = torch.randn(3, config.channels, 8, 8), condition_of(config)
    assert network(x, INTEGERS, condition).abs().max() == 0
    randomised(network)(x, INTEGERS, condition).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_blocks_are_the_identity_at_first():
    tokens = torch.randn(2, 16, 48)
    block = DiT(LABELLED).transformer_blocks[1]
    assert torch.equal(block(tokens, torch.randn(2, 48), None), tokens)


def test_the_text_has_no_influence_at_first():
    network = TextDiT(TEXT)
    torch.nn.init.normal_(network.proj_out.weight)  # 0 at first, so that no input has an influence
    x, one, other = torch.randn(3, 4, 8, 8), condition_of(TEXT), condition_of(TEXT)
    assert torch.equal(network(x, INTEGERS, one), network(x, INTEGERS, other))
    assert not torch.equal(network(x, INTEGERS, one), network(x, INTEGERS.flip(0), one))


def test_without_a_condition_it_is_the_null_class():
    network = randomised(DiT(LABELLED))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([10])
    null, labelled, absent = network(x, t, torch.tensor([10])), network(x, t, torch.tensor([3])), network(x, t)
    assert torch.equal(absent, null) and not torch.allclose(labelled, null)


@pytest.mark.parametrize("config", [LABELLED, TEXT], ids=["label", "text"])
def test_normalised_queries_do_not_grow_with_their_weights(config):
    network = randomised(build(replace(config, qk_norm=True)))
    x, condition = torch.randn(3, 4, 8, 8), condition_of(config)
    with torch.no_grad():
        before = network(x, INTEGERS, condition)
        for module in network.modules():
            if hasattr(module, "to_q"):
                module.to_q.weight *= 100
                module.to_q.bias *= 100
        after = network(x, INTEGERS, condition)
    assert torch.allclose(before, after, atol=1e-4)


def test_rotations_show_the_distance_of_two_tokens_alone():
    """Q . k depends on the two differences x - x' and y - y', on neither position itself, and on both axes."""
    torch.manual_seed(0)
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def product(first, second):
        pair = rotations(torch.tensor([first, second], dtype=torch.float64), 8).double()
        turned = [rotate(v[None, None, None], pair[:, i : i + 1]) for i, v in enumerate((q, k))]
        return float((turned[0] * turned[1]).sum())

    assert product((1, 2), (3, 5)) == pytest.approx(product((11, 4), (13, 7)), abs=1e-6)
    assert product((1, 2), (1, 2)) == pytest.approx(float(q @ k), abs=1e-6)
    assert abs(product((1, 2), (3, 5)) - product((1, 2), (4, 5))) > 1e-3
    assert abs(product((1, 2), (3, 5)) - product((1, 2), (3, 6))) > 1e-3


def test_another_grid_lies_in_the_same_square():
    assert grid_positions(2, 3, 3).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1.5], [1, 1.5], [2, 1.5]]


def test_with_rope_the_image_may_not_be_permuted():
    """Without positions, tokens are a set; the rotations alone must break that."""
    network = randomised(DiT(replace(LABELLED, rope=True)))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        drawn, of_mirrored = network(x, torch.tensor([5])), network(x.roll(2, dims=3), torch.tensor([5]))
    assert not torch.allclose(drawn.roll(2, dims=3), of_mirrored, atol=1e-3)


@pytest.mark.parametrize("config", [LABELLED, TEXT], ids=["label", "text"])
def test_recomputed_activations_give_the_same_gradients(config):
    network = randomised(build(replace(config, dropout=0.3, **EXTRAS))).train()
    x, condition = torch.randn(3, 4, 8, 8), condition_of(config)
    gradients = []
    for _ in range(2):
        torch.manual_seed(1)  # of dropout
        network.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(0) or tensor, lambda t: t):
            loss = network(x, INTEGERS, condition).square().mean()
        loss.backward()
        gradients.append(([parameter.grad.clone() for parameter in network.parameters()], len(kept)))
        network.checkpoint_gradients()
    (plain, many), (recomputed, few) = gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert few < many / 2


@pytest.mark.parametrize("config", [LABELLED, TEXT], ids=["label", "text"])
def test_in_bfloat16_it_is_nearly_the_same(config):
    network = randomised(build(replace(config, **EXTRAS)))
    x, condition = torch.randn(3, 4, 8, 8), condition_of(config)
    with torch.no_grad():
        exact = network(x, INTEGERS, condition)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x, INTEGERS, condition)
    assert 0 < (exact - rounded.float()).abs().max() < 0.05 * exact.abs().max()

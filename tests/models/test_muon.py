"""Muon: equal to torch's on matrices, convolutions as matrices, and which parameters it trains."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from models.networks.text_unet import TextUNet, TextUNetConfig
from models.networks.unet import UNet, UNetConfig
from models.optimization import muon
from models.optimization.muon import MuonWithAdamW, hidden_matrices, orthogonalize

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(6, 6), (6, 20), (20, 6), (6, 6), (12, 5), (5, 12), (1, 4)]
OPTIONS = {"lr": 0.02, "adamw_lr": 0.004, "momentum": 0.9, "weight_decay": 0.1}


def layers(shapes=SHAPES, seed=0):
    """Return linear layers with weights of the shapes, and biases."""
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Linear(columns, rows) for rows, columns in shapes)


def step(modules, optimizers, seed):
    """Make one step of the optimizers with equal random gradients for each of the modules."""
    for module in modules:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_share_the_matrices(monkeypatch):
    """Each computes on one thread; the weights and momenta have the bytes of a step on one thread."""
    calls, real, both_at_once = [], muon._update, threading.Barrier(2)

    def watched(group, parameters, gradients, buffers):
        if len(parameters) == 10:
            both_at_once.wait(timeout=30)
        calls.append((threading.get_ident(), torch.get_num_threads(), len(parameters)))
        real(group, parameters, gradients, buffers)

    monkeypatch.setattr(muon, "_update", watched)
    shapes = [(8, 8), (8, 72), (72, 8), (16, 144)] * 5
    both, one = layers(shapes), layers(shapes)
    optimizers = [MuonWithAdamW(modules, **OPTIONS) for modules in (both, one)]
    for seed in range(3):
        step([both], optimizers[:1], seed)
        torch.set_num_threads(1)
        step([one], optimizers[1:], seed)
        torch.set_num_threads(2)
    shared, alone = calls[:2], calls[2]
    assert [threads for _, threads, _ in calls] == [1] * len(calls)
    assert [matrices for *_, matrices in shared] == [10, 10]
    assert len({thread for thread, *_ in [*shared, alone]}) == 3
    assert alone == (threading.get_ident(), 1, 20)
    for first, second in zip(both.parameters(), one.parameters(), strict=True):
        assert torch.equal(first, second)
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, (first, second), strict=True)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.usefixtures("two_threads")
def test_few_matrices_are_not_shared(monkeypatch):
    calls, real = [], muon._update
    monkeypatch.setattr(muon, "_update", lambda *args: calls.append(threading.get_ident()) or real(*args))
    network = layers([(8, 8)] * 15)
    step([network], [MuonWithAdamW(network, **OPTIONS)], 0)
    assert calls == [threading.get_ident()]


def test_equals_torch_on_matrices(monkeypatch):
    """And AdamW's part equals torch's bit for bit. torch's Muon iterates in bfloat16; here it does in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    own, theirs = layers(), layers()
    matrices = [layer.weight for layer in theirs]
    biases = [layer.bias for layer in theirs]
    optimizers = [
        MuonWithAdamW(own, **OPTIONS),
        torch.optim.Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW(biases, lr=0.004, weight_decay=0.1, fused=True),
    ]
    before = [matrix.detach().clone() for matrix in matrices]
    for seed in range(4):
        step([own, theirs], optimizers, seed)
    for layer, matrix, bias, start in zip(own, matrices, biases, before, strict=True):
        assert torch.allclose(layer.weight, matrix, atol=2e-6)
        assert torch.equal(layer.bias, bias)
        assert (matrix - start).abs().max() > 1e-2, "the steps are far larger than the tolerance"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_matrix(memory_format):
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 7, 3, bias=False), nn.Linear(27, 7, bias=False)
    linear.weight.data = convolution.weight.data.flatten(1).clone()
    convolution.to(memory_format=memory_format)
    optimizers = [MuonWithAdamW(nn.ModuleList([module]), **OPTIONS) for module in (convolution, linear)]
    for seed in range(3):
        step([linear], optimizers[1:], seed)
        convolution.weight.grad = linear.weight.grad.view(7, 3, 3, 3).contiguous(memory_format=memory_format)
        optimizers[0].step()
    assert torch.allclose(convolution.weight.flatten(1), linear.weight, atol=1e-6)
    assert convolution.weight.is_contiguous(memory_format=memory_format)


def test_a_batch_equals_one_by_one():
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in SHAPES]
    for matrix, together in zip(matrices, orthogonalize(matrices), strict=True):
        (alone,) = orthogonalize([matrix])
        assert together.shape == matrix.shape
        assert torch.allclose(together, alone, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_orthogonalized_matrices(scale):
    """Singular vectors are kept, and values go to about 1, also of a matrix of condition 100; zero stays zero."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 8))[0] for size in (8, 30))
    values = torch.logspace(-2, 0, 8)
    (result,) = orthogonalize([scale * (u * values) @ v.T])
    rotated = u.T @ result @ v
    assert torch.allclose(rotated, rotated.diagonal().diag(), atol=1e-4)
    assert rotated.diagonal().min() > 0.6 and rotated.diagonal().max() < 1.25
    assert orthogonalize([torch.zeros(3, 4)])[0].count_nonzero() == 0


def test_a_nearly_singular_matrix_is_as_in_double_precision():
    """Iterating on the Gram matrix squares the condition, which must not cost more than the rounding of float32."""
    torch.manual_seed(0)
    matrix = torch.randn(64, 2) @ torch.randn(2, 576) + 1e-5 * torch.randn(64, 576)
    exact = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = exact @ exact.T
        exact = 3.4445 * exact + (-4.7750 * gram + 2.0315 * gram @ gram) @ exact
    assert (orthogonalize([matrix])[0] - exact).abs().max() < 1e-4


def test_an_overflow_in_half_precision_skips_the_step():
    """A gradient scaler and accelerate see one optimizer, whose step is skipped as a whole."""
    module = layers()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer, scaler = MuonWithAdamW(module, **OPTIONS), torch.amp.GradScaler("cpu")
    scaler.scale(sum(layer.weight.sum() + layer.bias.sum() for layer in module)).backward()
    module[0].bias.grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert scaler.get_scale() == 2**15


def remaining(network):
    """Return the weights of two and more dimensions that AdamW trains."""
    hidden = set(hidden_matrices(network))
    assert hidden <= {name for name, parameter in network.named_parameters() if parameter.ndim > 1}
    return {name for name, parameter in network.named_parameters() if parameter.ndim > 1 and name not in hidden}


def text_unet(**others):
    return TextUNet(
        TextUNetConfig(
            size=8,
            channels=4,
            cross_attention_dim=32,
            block_out_channels=(16, 32),
            attention=(False, True),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            **others,
        )
    )


class TestHiddenMatrices:
    def test_of_the_unet(self):
        network = UNet(UNetConfig(8, 1, (8, 16), (False, True), 1, 4, 8, conditions=3))
        assert remaining(network) == {
            "conv_in.weight",
            "conv_out.weight",
            "class_embedding.weight",
            "time_embedding.linear_1.weight",
        }
        assert "time_embedding.linear_2.weight" in hidden_matrices(network)

    def test_of_the_text_unet(self):
        """Cross-attention and both projections around a transformer are hidden."""
        network = text_unet(pooled=80)
        inputs = {f"{name}.linear_1.weight" for name in ("time_embedding", "add_embedding")}
        assert remaining(network) == {"conv_in.weight", "conv_out.weight", *inputs}

    def test_of_diffusers_transformers(self):
        from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

        options = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
        embedding = "transformer_blocks.0.norm1.emb"
        assert remaining(DiTTransformer2DModel(num_embeds_ada_norm=10, **options)) == {
            "pos_embed.proj.weight",
            f"{embedding}.timestep_embedder.linear_1.weight",
            f"{embedding}.class_embedder.embedding_table.weight",
            "proj_out_1.weight",
            "proj_out_2.weight",
        }
        text = PixArtTransformer2DModel(cross_attention_dim=16, caption_channels=12, **options)
        assert remaining(text) == {
            "pos_embed.proj.weight",
            "adaln_single.emb.timestep_embedder.linear_1.weight",
            "caption_projection.linear_1.weight",
            "transformer_blocks.0.scale_shift_table",
            "scale_shift_table",
            "proj_out.weight",
        }

    def test_none_with_a_lora_adapter_alone(self):
        network = text_unet(lora_rank=2)
        with pytest.raises(ValueError, match="no trained parameter is a hidden matrix"):
            MuonWithAdamW(network, **OPTIONS)
        network.requires_grad_(True)  # as with `train.full_steps`
        names = hidden_matrices(network)
        assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight" in names
        assert not any("lora" in name for name in names)


@pytest.mark.slow
def test_a_network_that_fsdp2_shards_is_trained_as_in_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.sharded", str(port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    difference, share = map(float, done.stdout.split())
    assert difference < 1e-3 and 0.4 < share < 0.6

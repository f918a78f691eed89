"""The training loop: its steps, learning rates, weight averages, loss sums and waits for the device."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.waits import Waits

RARELY = {"steps": 100, "log_every": 100, "checkpoint_every": 100, "sample_every": 100}


class TestAverages:
    @pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
    def test_exponents_of_the_paper(self, std, gamma):
        from models.optimization.ema import gamma_of_std

        assert gamma_of_std(std) == pytest.approx(gamma, abs=0.01)

    def test_power_law_weighs_the_past_as_its_profile_says(self):
        """The weight of step t in an average at T is proportional to t^gamma (Karras et al. 2024, eq. 1)."""
        import torch

        from models.optimization.ema import EMA

        steps, gamma = 2000, 3.0
        module = torch.nn.Linear(1, steps, bias=False)
        average = EMA(module, f"gamma-{gamma}")
        for step in range(1, steps + 1):
            with torch.no_grad():
                module.weight.zero_()[step - 1] = 1
            average.update(step)
        weights = average.state_dict()["weight"][:, 0].double().numpy()
        assert weights.sum() == pytest.approx(1, abs=1e-4)
        profile = np.arange(1, steps + 1) ** gamma
        assert np.allclose(weights[500:], (profile / profile.sum())[500:], rtol=0.01)
        centre = (weights * np.arange(1, steps + 1)).sum() / steps
        width = math.sqrt((weights * (np.arange(1, steps + 1) / steps - centre) ** 2).sum())
        assert width == pytest.approx(math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2), rel=0.01)

    @pytest.mark.parametrize("profile", ["decay-0.99", "decay-0.9", "std-0.10", "gamma-3"])
    def test_an_update_every_few_steps_has_the_decay_of_all_of_them(self, profile):
        from models.optimization.ema import decay_at

        for last in (8, 80, 800):
            alone = math.prod(decay_at(step, profile) for step in range(last - 7, last + 1))
            assert decay_at(last, profile, 8) == pytest.approx(alone, rel=1e-9, abs=1e-15)

    @pytest.mark.parametrize("profile", ["decay-0.99", "decay-0.9999", "std-0.05", "gamma-3"])
    @pytest.mark.parametrize("every", [4, 8])
    def test_of_weights_that_change_as_rarely_an_average_is_exact(self, profile, every):
        """The decays of the steps between two updates compound: no weight of the past is counted otherwise."""
        import torch

        from models.optimization.ema import EMA

        torch.manual_seed(0)
        module = torch.nn.Linear(8, 8, bias=False)
        often, rarely = EMA(module, profile), EMA(module, profile)
        for step in range(1, 161):
            if step % every == 1:
                torch.nn.init.normal_(module.weight)
            often.update(step)
            if step % every == 0:
                rarely.update(step, every)
                assert torch.allclose(often.weights[0], rarely.weights[0], atol=1e-5)
        assert not torch.allclose(often.weights[0], module.weight, atol=0.1)

    @pytest.mark.parametrize(("profile", "limit"), [("decay-0.99", 0.05), ("std-0.10", 0.045)])
    def test_the_error_of_rare_updates(self, profile, limit):
        """Weights that drift and jitter, averaged every 8 steps: relative to the distance of average and weights."""
        import torch

        from models.optimization.ema import EMA

        torch.manual_seed(0)
        module = torch.nn.Linear(100, 100, bias=False)
        often, rarely = EMA(module, profile), EMA(module, profile)
        direction = torch.randn(100, 100)
        for step in range(1, 801):
            with torch.no_grad():
                module.weight += 0.01 * direction + 0.1 * torch.randn(100, 100)
            often.update(step)
            if step % 8 == 0:
                rarely.update(step, 8)
        distance = (often.weights[0] - module.weight).norm()
        error = ((often.weights[0] - rarely.weights[0]).norm() / distance).item()
        print(f"{profile}: {error:.3f}")
        assert 0 < error < limit

    def test_names_without_a_meaning(self):
        from models.optimization.ema import decay_at

        assert decay_at(10**6, "decay-0.999") == 0.999
        assert decay_at(1, "decay-0.999") == pytest.approx(2 / 11)
        with pytest.raises(ValueError, match="unknown average"):
            decay_at(1, "mean-0.5")


def flat(parameters):
    """All values in one vector; those of convolutions may lie in memory channels last."""
    import torch

    return torch.cat([parameter.reshape(-1) for parameter in parameters])


def test_losses_are_averaged_by_range_of_timesteps():
    import torch

    from tasks.training.log import HistoryRow, Tally, timestep_range_names

    tally = Tally(10, torch.device("cpu"))
    tally.add_losses(torch.tensor([0, 2, 3, 9]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    tally.add_losses(torch.tensor([9]), torch.tensor([9.0]))
    for norm in (2.0, math.inf, 4.0):
        tally.add_gradient_norm(torch.tensor(norm))
    assert timestep_range_names(10) == ["loss_t0_2", "loss_t3_4", "loss_t5_7", "loss_t8_9"]
    expected = {
        "step": 7,
        "learning_rate": 0.1,
        "loss": 5.0,
        "loss_t0_2": 2.0,
        "loss_t3_4": 5.0,
        "loss_t8_9": 8.0,
        "grad_norm": 3.0,
    }
    row = tally.row(7, 0.1, tally.sums)
    assert row.to_json() == expected
    assert HistoryRow.from_json(expected) == row


def test_operations_of_a_network_are_counted():
    """A 3x3 convolution over 8x8 pixels and attention over 16 tokens, by hand."""
    import torch
    from torch import nn

    from models.flops import forward_flops, matmul_ceiling
    from models.networks.unet import Attention, UNetConfig

    config = UNetConfig(8, 1, (8,), (True,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)
    convolution = forward_flops(nn.Conv2d(3, 5, 3, padding=1), torch.randn(4, 3, 8, 8))
    assert convolution == 2 * 64 * 5 * 3 * 9
    attention = forward_flops(Attention(config, 8), torch.randn(2, 8, 4, 4))
    assert attention == 2 * (4 * 16 * 8 * 8 + 2 * 16 * 16 * 8)
    assert matmul_ceiling(torch.device("cpu"), torch.float32, 1) > 1e8


def test_the_loop_is_the_one_of_the_textbook(prepared):
    """The same loop without accelerate.

    AdamW on the mean loss of two accumulated parts, warm-up, half a cosine, gradient clipping, an average per step.
    """
    import torch

    from tasks import train

    options = {"gradient_accumulation": 2, "clip_norm": 1.0, "learning_rate": 0.01, "weight_decay": 0.1}
    run = prepared(ema=["decay-0.5"], pipeline_ema="decay-0.5", **RARELY | options | {"steps": 8, "warmup_steps": 3})
    plain = copy.deepcopy(run.network)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    rates = [0.01 / 3, 0.02 / 3, 0.01, *(0.005 * (1 + math.cos(math.pi * n / 5)) for n in range(3))]
    average = [parameter.detach().clone() for parameter in plain.parameters()]
    norms = []
    for step, rate in enumerate(rates):
        torch.cat([run.objective(plain, run.batches.draw(step, part)) for part in range(2)]).mean().backward()
        gradients = [parameter.grad for parameter in plain.parameters()]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        for gradient in gradients:
            gradient *= min(1.0, 1.0 / norms[-1])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, plain.parameters(), strict=True)]
    train.fit(run, None, [], until=len(rates))
    assert min(norms) < 1.0 < max(norms), "some gradients are clipped and some are not"
    own = flat
    # AdamW divides the rounding error of a gradient near zero by itself, so the mean is compared, not the maximum.
    assert (own(run.network.parameters()) - own(plain.parameters())).abs().mean() < 2e-5
    assert (own(run.averages["decay-0.5"].weights) - own(average)).abs().mean() < 2e-5


def test_averages_every_few_steps(prepared):
    """The average changes at these steps alone, and a run continues between them."""
    import torch

    from tasks import train
    from tasks.training import checkpoint
    from tasks.training.run import gather_tallies, snapshot

    options = {"ema": ["std-0.10"], "pipeline_ema": "std-0.10", "ema_every": 4, **RARELY}
    run, states = prepared(**options), {}
    for step in range(1, 9):
        train.fit(run, None, [], until=step)
        states[step] = snapshot(run, gather_tallies(run))
    averages = {step: state.tensors["std-0.10"]["conv_in.weight"] for step, state in states.items()}
    changed = [step for step in range(2, 9) if not torch.equal(averages[step], averages[step - 1])]
    assert changed == [4, 8]
    checkpoint.save(run.folder, states[6])
    continued = prepared(**options)
    assert continued.step == 6
    train.fit(continued, None, [], until=8)
    assert torch.equal(continued.averages["std-0.10"].state_dict()["conv_in.weight"], averages[8])


@pytest.mark.parametrize(
    ("options", "conditioning"),
    [({}, "label"), ({"gradient_accumulation": 2, "precision": "bf16", "channels_last": True}, "text")],
    ids=["plain", "bf16"],
)
def test_muon_continues_in_the_same_bytes(prepared, options, conditioning):
    """From a checkpoint in which a hidden matrix has a momentum, and a bias the averages of AdamW."""
    import torch

    from tasks import train
    from tasks.training import checkpoint
    from tasks.training.run import gather_tallies, snapshot

    def reached(until):
        run = prepared(conditioning, optimizer="muon", ema=["decay-0.5"], pipeline_ema="decay-0.5", **RARELY | options)
        began = run.step
        train.fit(run, None, [], until=until)
        return began, run, snapshot(run, gather_tallies(run))

    _, _, whole = reached(6)
    _, run, part = reached(4)
    checkpoint.save(run.folder, part)
    began, run, continued = reached(6)
    assert began == 4
    for group, tensors in whole.tensors.items():
        assert set(tensors) == set(continued.tensors[group])
        assert all(torch.equal(value, continued.tensors[group][name]) for name, value in tensors.items()), group
    assert not torch.equal(part.tensors["model"]["conv_in.weight"], whole.tensors["model"]["conv_in.weight"])
    state = whole.tensors["optimizer"]
    hidden = "mid_block.resnets.0.conv1"
    assert {name.rpartition("/")[2] for name in state if name.startswith(f"{hidden}.weight/")} == {"momentum_buffer"}
    assert {name.rpartition("/")[2] for name in state if name.startswith(f"{hidden}.bias/")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert state[f"{hidden}.weight/momentum_buffer"].count_nonzero()


def test_the_loop_with_muon_is_that_of_two_optimizers(prepared, monkeypatch):
    """Compare with torch's Muon in float32 on the matrices, with its learning rate, and AdamW on the rest."""
    import torch

    from models.optimization.muon import hidden_matrices
    from tasks import train

    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    options = {"optimizer": "muon", "lr_schedule": "constant", "warmup_steps": 2, "clip_norm": 1e6}
    options |= {"learning_rate": 0.01, "muon_learning_rate": 0.05, "muon_momentum": 0.8, "weight_decay": 0.1}
    run = prepared(**RARELY | options)
    plain, names = copy.deepcopy(run.network), hidden_matrices(run.network)
    hidden = [plain.get_parameter(name) for name in names]
    others = [parameter for name, parameter in plain.named_parameters() if name not in names]
    matrices = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in hidden]
    muon = torch.optim.Muon(matrices, momentum=0.8, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, weight_decay=0.1)
    for step in range(3):
        plain.zero_grad()
        run.objective(plain, run.batches.draw(step)).mean().backward()
        for weight, matrix in zip(hidden, matrices, strict=True):
            matrix.grad = weight.grad.flatten(1)
        for optimizer, rate in ((muon, 0.05), (adamw, 0.01)):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 2)
            optimizer.step()
        with torch.no_grad():
            for weight, matrix in zip(hidden, matrices, strict=True):
                weight.copy_(matrix.view(weight.shape))
    train.fit(run, None, [], until=3)
    own = flat
    difference = (own(run.network.parameters()) - own(plain.parameters())).abs()
    assert difference.mean() < 2e-5


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.002), ("cosine", 0.0)])
def test_learning_rates(schedule, last):
    from tasks import params
    from tasks.train import learning_rate_at

    section = params.load(Path("params.yaml")).train
    section = section.model_copy(update={"lr_schedule": schedule, "steps": 110, "warmup_steps": 10})
    rates = [learning_rate_at(step, section, 0.002) for step in (0, 4, 9, 10, 60, 110)]
    assert rates == pytest.approx([0.0002, 0.001, 0.002, 0.002, (0.002 + last) / 2, last])


@pytest.mark.parametrize(
    ("conditioning", "options"),
    [
        ("label", {"gradient_accumulation": 2, "precision": "bf16", "data_on_device": "device"}),
        ("text", {"data_on_device": "device"}),
        ("text", {"data_on_device": "stream"}),
        ("none", {"optimizer": "muon", "ema_every": 2, "gradient_checkpointing": True}),
    ],
)
def test_a_step_never_waits_for_the_device(prepared, conditioning, options):
    """Between two rows of the history no value is read, so that a GPU always has the next step in its queue."""
    from tasks import train

    run = prepared(conditioning, **RARELY, **options)
    waits = Waits()
    few = waits.during(lambda: train.fit(run, None, [], until=1))
    many = waits.during(lambda: train.fit(run, None, [], until=3))
    assert few == many > 0, "each call ends in a checkpoint, which waits; the steps must not wait"


def test_the_scale_of_a_loss_in_fp16_is_restored(prepared):
    import torch

    from tasks.training import checkpoint
    from tasks.training import run as training_run

    run, other = prepared(**RARELY), prepared(**RARELY)
    run.accelerator.scaler, other.accelerator.scaler = (torch.amp.GradScaler("cpu", growth_interval=3) for _ in "12")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for _ in range(4):  # the scale doubles once and is one step closer to the next doubling
        run.accelerator.scaler.scale(weight.sum()).backward()
        run.accelerator.scaler.step(optimizer)
        run.accelerator.scaler.update()
    checkpoint.save(run.folder, training_run.snapshot(run, training_run.gather_tallies(run)))
    training_run.restore(other, checkpoint.load_newest(run.folder, 100))
    assert other.accelerator.scaler.state_dict() == run.accelerator.scaler.state_dict()
    assert other.accelerator.scaler.state_dict()["scale"] == 2**17
    assert other.accelerator.scaler.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize(("free", "stored"), [(1e9, True), (1e5, False)])
def test_activations_are_stored_where_memory_allows(prepared, monkeypatch, capsys, free, stored):
    from tasks.training import stores

    monkeypatch.setattr(stores, "free_memory", lambda device: free)
    run = prepared(gradient_checkpointing="auto", data_on_device="device", **RARELY)
    assert run.network.down_blocks[0].recompute is not stored
    assert ("they are stored" in capsys.readouterr().out) is stored


def test_what_a_forward_pass_stores_is_counted():
    """The input of a linear layer, and under autocast also copies of its weight and of its input."""
    import torch

    from tasks.training.activations import stored_bytes
    from tasks.training.batches import Batch

    network = torch.nn.Linear(64, 32, bias=False)
    batch = Batch(torch.randn(4, 64).requires_grad_(), torch.randn(4, 64), torch.arange(4), None)
    assert stored_bytes(lambda batch: network(batch.x0), network, batch) == (0, 64 * 4)

    def lower(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return network(batch.x0)

    assert stored_bytes(lower, network, batch) == (64 * 32 * 2, 64 * 2)

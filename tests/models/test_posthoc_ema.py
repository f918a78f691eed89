"""Post-hoc EMA: profiles against the averages themselves, overlaps in closed form, and reconstructed averages."""

import numpy as np
import pytest

from models.optimization.ema import EMA, gamma_of_std
from models.posthoc_ema import Stored, combine, profile

KEPT = ("std-0.05", "std-0.10")


def every(steps, spacing, stds=(0.05, 0.10)):
    """The averages of these widths, stored every `spacing` steps and at the end."""
    return [Stored(step, gamma_of_std(std)) for step in {*range(spacing, steps + 1, spacing), steps} for std in stds]


@pytest.mark.parametrize("name", ["std-0.02", "std-0.10", "gamma-0.5"])
def test_a_profile_is_what_the_updates_weigh_each_step_with(name):
    """The weights after step s are the s-th unit vector, so that the average is the profile itself."""
    import torch

    from models.optimization.ema import gamma_of

    steps, halfway = 60, 25
    module = torch.nn.Linear(1, steps, bias=False)
    average, seen = EMA(module, name), {}
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.zero_()[step - 1] = 1
        average.update(step)
        seen[step] = average.state_dict()["weight"][:, 0].double().numpy().copy()
    for step in (1, halfway, steps):
        assert profile(Stored(step, gamma_of(name)), 1, steps) == pytest.approx(seen[step], abs=1e-6)
    assert profile(Stored(halfway, gamma_of(name)), 1, steps).sum() == pytest.approx(1, abs=1e-12)
    parts = [profile(Stored(halfway, gamma_of(name)), first, first + 9) for first in range(1, steps, 10)]
    assert np.array_equal(np.concatenate(parts), profile(Stored(halfway, gamma_of(name)), 1, steps))


def error_by_integrals(stored, coefficients, std, steps):
    """The relative error of continuous profiles, from the integral of the product of two (closed form)."""
    both = [*((each.step, each.gamma + 1) for each in stored), (steps, gamma_of_std(std) + 1)]
    overlaps = np.array(
        [[g * h / (g + h - 1) * min(a, b) ** (g + h - 1) / (a**g * b**h) for b, h in both] for a, g in both]
    )
    signed = np.append(coefficients, -1.0)
    return np.sqrt(signed @ overlaps @ signed / overlaps[-1, -1])


@pytest.mark.parametrize("std", [0.03, 0.07, 0.15])
def test_the_error_of_a_long_run_is_that_of_the_closed_form(std, monkeypatch):
    monkeypatch.setattr("models.posthoc_ema.BLOCK", 7000)
    stored = every(20_000, 4_000)
    found = combine(stored, std, 20_000)
    assert found.error == pytest.approx(error_by_integrals(stored, found.coefficients, std, 20_000), rel=1e-3)


@pytest.mark.parametrize("std", [0.02, 0.07, 0.25])
def test_no_other_coefficients_with_sum_one_are_better(std):
    stored, steps = every(500, 100), 500
    found = combine(stored, std, steps)
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)
    matrix = np.stack([profile(each, 1, steps) for each in stored], axis=1)
    wanted = profile(Stored(steps, gamma_of_std(std)), 1, steps)

    def error(coefficients):
        return np.linalg.norm(matrix @ coefficients - wanted) / np.linalg.norm(wanted)

    assert found.error == pytest.approx(error(found.coefficients), rel=1e-6)
    random = np.random.default_rng(0)
    for size in (1e-3, 0.1):
        moves = random.normal(size=(50, len(stored))) * size
        moves -= moves.mean(axis=1, keepdims=True)
        assert all(error(found.coefficients + move) > found.error for move in moves)


def test_a_stored_average_is_itself():
    stored = every(500, 100)
    found = combine(stored, 0.10, 500)
    assert found.error == pytest.approx(0, abs=1e-9)
    wanted = [float(each == Stored(500, gamma_of_std(0.10))) for each in stored]
    assert found.coefficients == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("std", "with_two", "with_sixteen"),
    [(0.07, 0.05, 0.004), (0.03, 0.18, 0.04), (0.15, 0.25, 0.01), (0.02, 0.35, 0.13)],
)
def test_snapshots_make_profiles_exact(std, with_two, with_sixteen):
    """The two averages of the end alone have errors of 5, 18, 25 and 35 %."""
    assert combine(every(6400, 6400), std, 6400).error == pytest.approx(with_two, abs=0.005)
    assert combine(every(6400, 400), std, 6400).error < with_sixteen


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="no stored averages"):
        combine([], 0.1, 100)
    for std in (0.0, -0.1, 0.29, 1.0):
        with pytest.raises(ValueError, match=r"must lie between 0 and 0\.289"):
            combine(every(100, 100), std, 100)


def test_reconstructed_averages_of_a_training_are_the_true_ones():
    """A network that learns in noisy steps, with averages of other widths tracked beside the stored ones."""
    import torch

    steps, spacing, wanted = 512, 32, ("std-0.03", "std-0.07", "std-0.15")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    teacher = torch.randn(8, 4, generator=generator)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    averages = {name: EMA(module, name) for name in (*KEPT, *wanted)}
    stored, kept = [], []
    for step in range(1, steps + 1):
        x = torch.randn(16, 8, generator=generator)
        loss = (module(x) - x @ teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average in averages.values():
            average.update(step)
        if step % spacing == 0:
            for name in KEPT:
                stored.append(Stored(step, gamma_of_std(float(name.removeprefix("std-")))))
                kept.append(flat(averages[name]))
    last = flat(averages["std-0.05"])
    for name in wanted:
        std = float(name.removeprefix("std-"))
        true, found = flat(averages[name]), combine(stored, std, steps)
        error = np.linalg.norm(found.coefficients @ np.stack(kept) - true) / np.linalg.norm(last - true)
        assert error < 0.03, (name, error)
        # Nothing of the constant part of the weights may get lost, however much of the noise is averaged.
        shifted = found.coefficients @ (np.stack(kept) + 100.0)
        assert shifted == pytest.approx(found.coefficients @ np.stack(kept) + 100.0, abs=1e-9)


def flat(average):
    return np.concatenate([value.double().numpy().ravel() for value in average.state_dict().values()])

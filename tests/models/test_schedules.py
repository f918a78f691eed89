"""Noise schedules against diffusers' and against closed forms."""

import numpy as np
import pytest

from models.noise import schedules

THEIRS = {
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    # As the scheduler_config.json of Stable Diffusion has it.
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}


@pytest.mark.parametrize("timesteps", [2, 10, 100, 500, 777, 1000])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_equals_diffusers(name, timesteps):
    from diffusers import DDPMScheduler

    expected = DDPMScheduler(timesteps, **THEIRS[name]).betas.numpy()
    assert np.abs(schedules.betas(name, timesteps) - expected).max() < 1e-6


@pytest.mark.parametrize("timesteps", [2, 100, 1000])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_zero_terminal_snr_equals_diffusers(name, timesteps):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(timesteps, **THEIRS[name], rescale_betas_zero_snr=True)
    ours = schedules.alpha_bar(schedules.betas(name, timesteps, zero_terminal_snr=True))
    assert np.abs(ours - scheduler.alphas_cumprod.numpy()).max() < 1e-5


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_zero_terminal_snr_shifts_and_scales_the_signal(name):
    """The first level stays, the last is 0 exactly, and sqrt(alpha_bar) between them keeps its proportions."""
    plain = np.sqrt(schedules.alpha_bar(schedules.betas(name, 1000)))
    beta = schedules.betas(name, 1000, zero_terminal_snr=True)
    rescaled = np.sqrt(schedules.alpha_bar(beta))
    assert (rescaled[0], rescaled[-1], beta[-1]) == (pytest.approx(plain[0], abs=1e-12), 0, 1)
    assert np.allclose(rescaled, (plain - plain[-1]) / (plain[0] - plain[-1]) * plain[0], atol=1e-12)
    assert ((beta > 0) & (beta <= 1)).all()
    assert schedules.log_snr(rescaled**2)[-1] == -np.inf


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_signal_falls_all_the_way(name):
    alpha_bar = schedules.alpha_bar(schedules.betas(name, 1000))
    assert alpha_bar[0] > 0.999
    assert (np.diff(alpha_bar) < 0).all()
    assert (np.diff(schedules.log_snr(alpha_bar)) < 0).all()


def test_snr_in_numbers():
    assert np.exp(schedules.log_snr(np.array([0.5, 0.8, 0.0]))) == pytest.approx([1, 4, 0])
    assert schedules.log_snr(np.array([0.5, 0.8])) == pytest.approx([0, np.log(4)])


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"'quadratic'.*linear, cosine, sigmoid, scaled_linear"):
        schedules.betas("quadratic", 10)

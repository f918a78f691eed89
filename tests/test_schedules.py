"""Noise schedules against diffusers' and against closed forms."""

import numpy as np
import pytest

from models import schedules

DIFFUSERS_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


@pytest.mark.parametrize("timesteps", [10, 100, 1000])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_equals_diffusers(name, timesteps):
    from diffusers import DDPMScheduler

    expected = DDPMScheduler(timesteps, beta_schedule=DIFFUSERS_NAME[name]).betas.numpy()
    assert np.abs(schedules.betas(name, timesteps) - expected).max() < 1e-6


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_signal_falls_all_the_way(name):
    alpha_bar = schedules.alpha_bar(schedules.betas(name, 1000))
    assert alpha_bar[0] > 0.999
    assert (np.diff(alpha_bar) < 0).all()
    assert (np.diff(schedules.log_snr(alpha_bar)) < 0).all()


def test_log_snr_of_equal_parts_is_zero():
    assert schedules.log_snr(np.array([0.5]))[0] == 0


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"'quadratic'.*linear, cosine, sigmoid"):
        schedules.betas("quadratic", 10)

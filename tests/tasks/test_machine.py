"""The kernels that a training takes."""

import torch

from tasks.params import TrainParams
from tasks.training import machine


def test_deterministic_kernels(monkeypatch):
    monkeypatch.delenv(machine.CUBLAS, raising=False)
    try:
        machine.choose_kernels(TrainParams.model_construct(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert machine.os.environ[machine.CUBLAS] == ":4096:8"
    finally:
        machine.choose_kernels(TrainParams.model_construct())
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark

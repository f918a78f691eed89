"""Arithmetic of a GPU: float32 in full, as on the other side of a comparison with ONNX Runtime."""

import pytest
import torch

from models import device


@pytest.fixture
def settings():
    """What PyTorch begins with, restored after the test."""
    before = found()
    put(True, False, False)
    yield
    put(*before)


def found() -> tuple[bool, bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark


def put(convolutions: bool, products: bool, benchmark: bool) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.benchmark = benchmark


def test_float32_is_full_on_a_gpu(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.best_device() == "cuda"
    assert found() == (False, False, True)


def test_a_cpu_changes_no_setting(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.best_device() == "cpu"
    assert found() == (True, False, False)


def test_onnx_runtime_has_the_same_setting(monkeypatch):
    import onnxruntime

    from models import bundle

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [bundle.CUDA, bundle.CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(bundle, "_has_gpu", lambda: True)
    assert bundle.usable_providers() == [(bundle.CUDA, {"use_tf32": 0}), bundle.CPU]


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, False),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_emulates_it(monkeypatch, capabilities, emulated):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.emulates_bf16("cpu") == emulated
    assert not device.emulates_bf16("cuda")

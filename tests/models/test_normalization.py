"""Group normalization in NHWC: equal to PyTorch's, and without a copy to NCHW on a GPU, which is traced without one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from models.networks.normalization import GroupNorm, group_norm, replace_group_norms

GROUPS = 4


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(2, 8, 6, 5, dtype=torch.float64)).to(dtype).to(memory_format=torch.channels_last)
    return x.requires_grad_(), torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_equals_torch_with_its_gradients(dtype, tolerance):
    """In bfloat16 the reference is float32 of the same input, as autocast computes it on a GPU."""
    x, weight, bias = inputs(dtype)
    results = []
    for function in (
        lambda x: group_norm(x, GROUPS, weight, bias, 1e-5),
        lambda x: F.group_norm(x.float(), GROUPS, weight, bias),
    ):
        output = F.silu(function(x))
        results.append((output, *torch.autograd.grad(output.square().sum(), (x, weight, bias))))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def traced(function, device: str, backward: bool) -> tuple[str, bool]:
    """Return the graph of a function in NHWC, with its backward pass, and whether what it returns is in NHWC.

    Nothing is computed, so the device need not be there; but autograd needs it.
    """
    with FakeTensorMode():
        x = torch.empty(2, 8, 6, 5, device=device).to(memory_format=torch.channels_last)
        weight, bias = torch.empty(8, device=device), torch.empty(8, device=device)

        def passes(x, weight, bias):
            output = function(x.requires_grad_(backward), weight, bias)
            return (output, *torch.autograd.grad(output.square().sum(), x)) if backward else (output,)

        code = make_fx(passes)(x, weight, bias).code
        return code, all(value.is_contiguous(memory_format=torch.channels_last) for value in passes(x, weight, bias))


def test_no_copy_to_nchw_on_a_gpu():
    def ours(x, weight, bias):
        return F.silu(group_norm(x, GROUPS, weight, bias, 1e-5))

    for device, backward in (("cuda", False), ("cpu", True)):
        code, nhwc = traced(ours, device, backward)
        assert nhwc and "clone" not in code and "contiguous" not in code
    code, nhwc = traced(lambda x, weight, bias: F.silu(F.group_norm(x, GROUPS, weight, bias)), "cuda", backward=False)
    assert not nhwc and "clone" in code, "PyTorch now keeps NHWC itself: this module is no longer needed"


def test_on_a_cpu_it_is_that_of_torch():
    x, weight, bias = inputs()
    norm = GroupNorm(GROUPS, 8)
    norm.weight, norm.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    expected = F.group_norm(x, GROUPS, weight, bias)
    assert torch.equal(norm(x), expected)
    assert torch.equal(torch.compile(norm, backend="eager")(x), expected)


def test_within_autocast_on_a_cpu_statistics_and_output_are_float32():
    """PyTorch's own kernel for bfloat16 in NHWC is several times slower."""
    x, weight, bias = inputs()
    norm = GroupNorm(GROUPS, 8)
    norm.weight, norm.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    lower = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(lower)
    assert output.dtype == torch.float32
    assert torch.equal(output, F.group_norm(lower.float(), GROUPS, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):  # as FSDP2 gathers the parameters
        gathered = norm.bfloat16()(lower)
    assert torch.equal(
        gathered, F.group_norm(lower.float(), GROUPS, weight.bfloat16().float(), bias.bfloat16().float())
    )


def test_the_norms_of_diffusers_are_replaced():
    network = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.Sequential(torch.nn.GroupNorm(2, 4)))
    weight = network[0].weight
    replace_group_norms(network)
    assert [type(module) for module in network.modules() if isinstance(module, torch.nn.GroupNorm)] == [GroupNorm] * 2
    assert network[0].weight is weight

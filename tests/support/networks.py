"""Networks with random weights."""

import torch


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: what starts at zero could hide a difference."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()

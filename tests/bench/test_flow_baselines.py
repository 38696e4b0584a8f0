"""What the flow is measured against does the same work, and floors are below what that work takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.flow_baselines import FlowStep, Sampling, floor, network
from decovae.models.flow_unet import FlowUNetConfig

TINY = FlowUNetConfig(channels=(8, 16), attention=(False, True), residual_blocks=1, head_channels=8, groups=4)


def twins() -> list[nn.Module]:
    ours = network("ours", TINY, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    plain, monai = network("plain", TINY, 2), network("monai", TINY, 2)
    plain.load_state_dict(ours.state_dict())
    monai.get_submodule("network").load_state_dict(ours.state_dict())
    return [ours, plain, monai]


def test_training_steps_have_one_loss() -> None:
    latents = torch.randn(2, 2, 4, 4, 4)
    losses = []
    for model in twins():
        torch.manual_seed(1)
        losses.append(FlowStep(model)(latents))
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-5, atol=1e-5)


def test_samplings_end_at_one_latent() -> None:
    noise = torch.randn(1, 2, 4, 4, 4)
    with torch.no_grad():
        ends = [Sampling(model, 3)(noise) for model in twins()]
    torch.testing.assert_close(ends[1:], ends[:1] * 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_is_below_what_networks_do(backward: bool) -> None:
    shape = (2, 2, 4, 4, 4)
    least = floor(TINY, shape, itemsize=4, backward=backward)
    assert least.bytes_moved > 0
    for model in twins()[1:]:
        with FlopCounterMode(display=False) as count:
            velocity = model(torch.randn(shape), torch.rand(2))
            if backward:
                velocity.sum().backward()
        # Backward of the first convolution and of the embeddings needs no gradient of what goes in.
        inputs = 2 * 2 * 8 * 27 * 64 * 2 + 2 * 2 * 8 * 32 if backward else 0
        assert least.flops <= count.get_total_flops() + inputs
    assert floor(TINY, shape, itemsize=2, backward=backward).bytes_moved * 2 == least.bytes_moved

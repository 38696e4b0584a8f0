"""What the flow is measured against: MONAI's U-Net, and this project's without its fused operators; and the floors.

A training step is a module from latents to a loss, sampling one from noise to latents; all have the same parameters.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

from bench.floors import Floor
from decovae.generation.flow_matching import TimeSchedule, flow_matching_loss
from decovae.generation.solvers import integrate
from decovae.models.flow_blocks import ResidualBlock
from decovae.models.flow_unet import TIMESTEPS, FlowUNet, FlowUNetConfig


@register_flop_formula(torch.ops.aten.mkldnn_convolution)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Of what a single volume on the CPU is convolved by, which torch counts under another name only."""
    return conv_flop_count(list(x), list(weight), list(out_shape))


class Monai(nn.Module):
    """MONAI's U-Net at this project's times."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.network(x, TIMESTEPS * (1 - t.expand(x.shape[0])))
        return velocity


class FlowStep(nn.Module):
    """The flow matching loss of a batch of latents."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> Tensor:
        times = torch.rand(latents.shape[0], device=latents.device)
        return flow_matching_loss(self.network, latents, torch.randn_like(latents), times).mean()


class Sampling(nn.Module):
    """Euler's method from noise, on the times of a schedule."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        self.network = network
        self.steps = steps

    def forward(self, noise: Tensor) -> Tensor:
        times = TimeSchedule().times(self.steps, math.prod(noise.shape[2:]))
        return integrate(self._velocity, noise, times, solver="euler")

    def _velocity(self, x: Tensor, t: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        velocity: Tensor = self.network(x, t).float()
        return velocity.clone()  # the next replay of a CUDA graph writes over it


def monai(config: FlowUNetConfig, channels: int) -> nn.Module:
    """MONAI's U-Net of the same shape, (x, timesteps) → velocity."""
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    network: nn.Module = DiffusionModelUNetMaisi(
        spatial_dims=3,
        in_channels=channels,
        out_channels=channels,
        num_channels=config.channels,
        attention_levels=config.attention,
        num_res_blocks=config.residual_blocks,
        num_head_channels=config.head_channels,
        norm_num_groups=config.groups,
        norm_eps=config.eps,
        resblock_updown=True,
        include_fc=True,
        use_flash_attention=torch.cuda.is_available(),  # which it allows nowhere else
    )
    return network


def network(name: str, config: FlowUNetConfig, channels: int) -> nn.Module:
    """The velocity network (x, t) → velocity: "ours", "plain" or "monai"."""
    if name == "monai":
        return Monai(monai(config, channels))
    return FlowUNet(config, channels, fused=None if name == "ours" else False)


@functools.cache
def floor(config: FlowUNetConfig, shape: tuple[int, ...], *, itemsize: int, backward: bool) -> Floor:
    """The least that the network has to move and multiply, counted as in `bench.floors`; attention's tensors left out.

    Products are those of this project's network, whose convolution after a doubling of the size runs on the voxels
    before it; forward once, and twice backward.
    """
    elements = {"norm": 0, "convolution in": 0, "convolution out": 0, "sum": 0}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, nn.GroupNorm):
            elements["norm"] += inputs[0].numel()
        elif isinstance(module, nn.Conv3d):
            elements["convolution in"] += inputs[0].numel()
            elements["convolution out"] += output.numel()
        elif isinstance(module, ResidualBlock):
            elements["sum"] += output.numel()
            if module.resample == "up":
                elements["convolution in"] += inputs[0].numel()
                elements["convolution out"] += output.numel()

    with torch.device("meta"):
        model = FlowUNet(config, shape[1], fused=False)
        for module in model.modules():
            module.register_forward_hook(count)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(torch.empty(shape), torch.empty(shape[0]))
    inside, outside = elements["convolution in"], elements["convolution out"]
    forward = inside + outside + elements["sum"]
    moved = forward + backward * (3 * elements["norm"] + 2 * inside + outside + elements["sum"])
    return Floor(itemsize * moved, (1 + 2 * backward) * int(flops.get_total_flops()))

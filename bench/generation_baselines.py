"""From noise to a volume: this project's sampler, and MONAI's two networks in the loop that its tutorials have."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.block_baselines import monai_autoencoder
from bench.flow_baselines import Monai, Sampling, monai
from decovae.data.frame import Frame
from decovae.generation.flow_file import FlowDescription
from decovae.generation.flow_matching import TimeSchedule
from decovae.generation.latent_space import LatentSpace
from decovae.generation.sampling import Sampler
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig

Precision = Literal["fp32", "bf16"]


class OurVolume(nn.Module):
    """Noise (1, C, d, h, w) to an image on the CPU, by the sampler of ``decovae sample``.

    Args:
        flow: shape of the flow.
        autoencoder: shape of the autoencoder.
        latent: (C, d, h, w).
        steps: Euler's.
        precision: of the networks.
        device: where to compute.
        compiled: compile the flow, with CUDA graphs.
    """

    def __init__(
        self,
        flow: FlowUNetConfig,
        autoencoder: AutoencoderConfig,
        latent: tuple[int, int, int, int],
        *,
        steps: int,
        precision: Precision,
        device: torch.device,
        compiled: bool,
    ) -> None:
        super().__init__()
        channels, *shape = latent
        depth, height, width = (autoencoder.compression * size for size in shape)
        grid = depth, height, width
        self.flow, self.autoencoder = FlowUNet(flow, channels), Autoencoder(autoencoder)
        identity = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        space = LatentSpace(
            encoder="",
            channels=channels,
            shape=(shape[0], shape[1], shape[2]),
            grid=grid,
            frame=Frame(grid, identity),
            mean=0.0,
            std=1.0,
            noise=0.0,
            data="none: the weights are random",
        )
        description = FlowDescription(space, flow, (), TimeSchedule(), "mean", steps=0, seed=0)
        self.sampler = Sampler(
            self.flow.eval(),
            description,
            self.autoencoder.eval(),
            device=device,
            steps=steps,
            precision=precision,
            compile=compiled,
        )

    def forward(self, noise: Tensor) -> Tensor:
        image: Tensor = self.sampler.decode(self.sampler.latents(noise)[0])
        return image


class MonaiVolume(nn.Module):
    """The same by MONAI's U-Net and autoencoder, all in one precision.

    Args:
        flow: as for `OurVolume`, like what follows.
        autoencoder: too.
        latent: too.
        steps: too.
        precision: too.
        device: too.
        compiled: compile both, the flow with CUDA graphs.
        channels_last: lay the U-Net's weights out so; the autoencoder's norms take no other layout than contiguous.
        float16: the autoencoder's norms write float16, and autocast is to that in both networks.
    """

    def __init__(
        self,
        flow: FlowUNetConfig,
        autoencoder: AutoencoderConfig,
        latent: tuple[int, int, int, int],
        *,
        steps: int,
        precision: Precision,
        device: torch.device,
        compiled: bool,
        channels_last: bool = False,
        float16: bool = False,
    ) -> None:
        super().__init__()
        self.device = device
        dtype = torch.float16 if float16 else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype, enabled=precision == "bf16")
        self.flow = Monai(monai(flow, latent[0])).to(device).eval()
        if channels_last:
            self.flow = self.flow.to(memory_format=torch.channels_last_3d)
        self.autoencoder = monai_autoencoder(autoencoder, float16=float16).to(device).eval()
        velocity: Any = self.flow
        decode: Any = self.autoencoder.decode
        if compiled:
            velocity = torch.compile(velocity, mode="reduce-overhead", dynamic=False)
            decode = torch.compile(decode, dynamic=False)
        self.sampling, self.decode = Sampling(velocity, steps), decode

    @torch.no_grad()
    def forward(self, noise: Tensor) -> Tensor:
        with self.autocast:
            image: Tensor = self.decode(self.sampling(noise.to(self.device)))
        return image[0].float().cpu()


def volume(
    name: str,
    flow: FlowUNetConfig,
    autoencoder: AutoencoderConfig,
    latent: tuple[int, int, int, int],
    *,
    steps: int,
    precision: Precision,
    device: torch.device,
) -> nn.Module:
    """Noise to a volume: "ours" or "monai…", with "-compiled" behind it if so.

    MONAI's may be "monai-channels-last…" in its U-Net, or "monai-float16…" in its autoencoder.
    """
    compiled = name.endswith("compiled")
    if name.startswith("ours"):
        return OurVolume(flow, autoencoder, latent, steps=steps, precision=precision, device=device, compiled=compiled)
    return MonaiVolume(
        flow,
        autoencoder,
        latent,
        steps=steps,
        precision=precision,
        device=device,
        compiled=compiled,
        channels_last="channels-last" in name,
        float16="float16" in name,
    )


def voxels(latent: tuple[int, ...], compression: int) -> int:
    """Voxels of the volume that a latent decodes to."""
    return math.prod(latent[-3:]) * compression**3

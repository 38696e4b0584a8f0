"""From noise to a volume: this project's sampler, and MONAI's two networks in the loop that its tutorials have."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Chain:
    """What is done from noise to a volume, whoever does it.

    Attributes:
        flow: shape of the flow.
        autoencoder: shape of the autoencoder.
        latent: (C, d, h, w).
        steps: Euler's.
        precision: of the networks.
        device: where to compute.
    """

    flow: FlowUNetConfig
    autoencoder: AutoencoderConfig
    latent: tuple[int, int, int, int]
    steps: int
    precision: Precision
    device: torch.device

    @property
    def voxels(self) -> int:
        """Of the volume."""
        return math.prod(self.latent[1:]) * self.autoencoder.compression**3


class OurVolume(nn.Module):
    """Noise (1, C, d, h, w) to an image on the CPU, by the sampler of ``decovae sample``.

    Args:
        chain: what is done.
        compiled: compile the flow, with CUDA graphs.
    """

    def __init__(self, chain: Chain, *, compiled: bool) -> None:
        super().__init__()
        channels, *shape = chain.latent
        depth, height, width = (chain.autoencoder.compression * size for size in shape)
        grid = depth, height, width
        self.flow, self.autoencoder = FlowUNet(chain.flow, channels), Autoencoder(chain.autoencoder)
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
        description = FlowDescription(space, chain.flow, (), TimeSchedule(), "mean", steps=0, seed=0)
        self.sampler = Sampler(
            self.flow.eval(),
            description,
            self.autoencoder.eval(),
            device=chain.device,
            steps=chain.steps,
            precision=chain.precision,
            compile=compiled,
        )

    def forward(self, noise: Tensor) -> Tensor:
        image: Tensor = self.sampler.decode(self.sampler.latents(noise)[0])
        return image


class MonaiVolume(nn.Module):
    """The same by MONAI's U-Net and autoencoder, all in one precision.

    Args:
        chain: what is done.
        compiled: compile both, the flow with CUDA graphs.
        channels_last: lay the U-Net's weights out so; the autoencoder's norms take no other layout than contiguous.
        float16: the autoencoder's norms write float16, and autocast is to that in both networks.
    """

    def __init__(self, chain: Chain, *, compiled: bool, channels_last: bool = False, float16: bool = False) -> None:
        super().__init__()
        self.device = chain.device
        dtype = torch.float16 if float16 else torch.bfloat16
        self.autocast = torch.autocast(chain.device.type, dtype, enabled=chain.precision == "bf16")
        self.flow = Monai(monai(chain.flow, chain.latent[0])).to(chain.device).eval()
        if channels_last:
            self.flow = self.flow.to(memory_format=torch.channels_last_3d)
        self.autoencoder = monai_autoencoder(chain.autoencoder, float16=float16).to(chain.device).eval()
        velocity: Any = self.flow
        decode: Any = self.autoencoder.decode
        if compiled:
            velocity = torch.compile(velocity, mode="reduce-overhead", dynamic=False)
            decode = torch.compile(decode, dynamic=False)
        self.sampling, self.decode = Sampling(velocity, chain.steps), decode

    @torch.no_grad()
    def forward(self, noise: Tensor) -> Tensor:
        with self.autocast:
            image: Tensor = self.decode(self.sampling(noise.to(self.device)))
        return image[0].float().cpu()


def volume(name: str, chain: Chain) -> nn.Module:
    """Noise to a volume: "ours" or "monai…", with "-compiled" behind it if so.

    MONAI's may be "monai-channels-last…" in its U-Net, or "monai-float16…" in its autoencoder.
    """
    compiled = name.endswith("compiled")
    if name.startswith("ours"):
        return OurVolume(chain, compiled=compiled)
    return MonaiVolume(chain, compiled=compiled, channels_last="channels-last" in name, float16="float16" in name)

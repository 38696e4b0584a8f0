"""Building blocks of the MAISI autoencoder, in plain torch.

This file is the definition of what the blocks compute; `decovae.fuse` gives them, and MONAI's like them, another way to
compute it. Parameter names equal those of MONAI's ``AutoencoderKlMaisi``, whose convolutions sit inside one or two
wrapper modules called ``conv``.

All blocks map (N, C, D, H, W) floating-point tensors to the same, in any memory format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Named(nn.Module):
    """A module held under the name ``conv``: gives its parameters the key that MONAI's wrappers give them."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def convolution(
    in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1, padding: int = 1
) -> Named:
    """A 3D convolution whose parameters are called ``conv.conv.weight`` and ``conv.conv.bias``."""
    return Named(Named(nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride, padding=padding)))


def pointwise(in_channels: int, out_channels: int) -> Named:
    """A 1×1×1 convolution whose parameters are called ``conv.weight`` and ``conv.bias``."""
    return Named(nn.Conv3d(in_channels, out_channels, 1))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1×1 shortcut where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = convolution(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = convolution(out_channels, out_channels)
        self.nin_shortcut = (
            nn.Identity() if in_channels == out_channels else convolution(in_channels, out_channels, 1, padding=0)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class Downsample(nn.Module):
    """Halves each axis: one voxel of zeros at the far end of each axis, then a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles each axis: trilinear interpolation (half-pixel centres), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="trilinear"))
        return out


class Cascade(nn.Module):
    """Blocks applied one after the other, held under the name ``blocks``."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

"""Building blocks of the flow's U-Net, named as in MONAI's ``DiffusionModelUNetMaisi``.

All blocks map (N, C, D, H, W) floating-point tensors to the same, in any memory format; `emb` is (N, 4 · first width),
what the time and the conditions are embedded as.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decovae.models.blocks import Named
from decovae_kernels import convolution as convolved
from decovae_kernels import group_norm, norm_conv

Resample: TypeAlias = Literal["up", "down"]


class Convolution(nn.Conv3d):
    """`nn.Conv3d`, also fast for one small volume on the CPU, which torch does not give to oneDNN by itself."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1 or not _inference_on_cpu(x):
            return super().forward(x)
        assert not isinstance(self.padding, str)
        walk = self.padding, self.stride, self.dilation, self.groups
        out: Tensor = torch.ops.aten.mkldnn_convolution(x, self.weight, self.bias, *walk)
        return out


def _inference_on_cpu(x: Tensor) -> bool:
    """Whether x is in float32 on a CPU with oneDNN, outside of autocast, of gradients and of compilation."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.is_available()


def convolution(in_channels: int, out_channels: int, kernel_size: int = 3, *, zero: bool = False) -> Named:
    """A 3D convolution that keeps the size; its parameters are ``conv.weight`` and ``conv.bias``, zero on request."""
    conv = Convolution(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    if zero:
        for parameter in conv.parameters():
            nn.init.zeros_(parameter)
    return Named(conv)


class ResidualBlock(nn.Module):
    """skip(x) + conv₂(silu(norm₂(conv₁(resample(silu(norm₁(x)))) + projection(silu(emb))))).

    The skip is 1×1×1 where the number of channels changes. "up" doubles each axis (nearest), "down" halves it (mean),
    on both ways. The second convolution starts at zero.

    Attributes:
        fused: compute norm, SiLU and convolution as one operator, channels-last, and keep no activation between them
            for backward; None does so on CUDA.
    """

    fused: bool | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        groups: int,
        eps: float,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = convolution(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(embedding, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = convolution(out_channels, out_channels, zero=True)
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else convolution(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift: Tensor = self.time_emb_proj(F.silu(emb))
        if fuses(self.fused, x):
            x, h = self._fused(x, shift)
        else:
            x, h = self._plain(x, shift)
        out: Tensor = self.skip_connection(x) + h
        return out

    def _plain(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The resampled x, and what is added to it."""
        h = F.silu(self.norm1(x))
        # Back to its dtype: on the CPU autocast resamples in float32, which norms with bfloat16 weights do not take.
        if self.resample == "down":
            x, h = F.avg_pool3d(x, 2).to(x.dtype), F.avg_pool3d(h, 2).to(h.dtype)
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest").to(x.dtype)
            h = doubled_convolution(h, cast(nn.Conv3d, self.conv1.conv))
        else:
            h = self.conv1(h)
        return x, self.conv2(F.silu(self.norm2(h + _spread(shift))))

    def _fused(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The same by the fused operators."""
        norm = self.norm1
        if self.resample is None:
            h, statistics = norm_silu_convolution(x, norm, self.conv1)
        else:
            resampled = doubled if self.resample == "up" else halved
            h = resampled(group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps))
            x = resampled(x)
            conv = cast(nn.Conv3d, self.conv1.conv)
            h, statistics = convolved(h, conv.weight, conv.bias)
        return x, norm_silu_convolution(
            h + _spread(shift).to(h.dtype), self.norm2, self.conv2, _shifted(statistics, shift)
        )[0]


def _spread(shift: Tensor) -> Tensor:
    return shift[:, :, None, None, None]


def fuses(wanted: bool | None, x: Tensor) -> bool:
    """Whether features like x go through the fused operators: as wanted, and if nothing is, on CUDA."""
    return x.is_cuda if wanted is None else wanted


def norm_silu_convolution(
    x: Tensor, norm: nn.GroupNorm, conv: Named, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """conv(silu(norm(x))) as one operator, given x's channel statistics if they are known, and its own."""
    inner = cast(nn.Conv3d, conv.conv)
    return norm_conv(
        x, norm.weight, norm.bias, norm.num_groups, norm.eps, inner.weight, inner.bias, statistics=statistics
    )


def _shifted(statistics: Tensor, shift: Tensor) -> Tensor:
    """Channel statistics (count, mean, squared distances from it) of features to which a number a channel is added."""
    count, mean, scatter = statistics.detach().unbind(2)
    return torch.stack((count, mean + shift.detach()[:, None].to(mean.dtype), scatter), dim=2)


def doubled_convolution(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """The 3×3×3 convolution of x doubled along each axis (nearest), (N, O, 2D, 2H, 2W), from the voxels of x alone.

    Along an axis, output 2i is w₀ x[i−1] + (w₁ + w₂) x[i] and output 2i + 1 is (w₀ + w₁) x[i] + w₂ x[i+1]: a transposed
    convolution of stride 2 with the four taps w₂, w₁ + w₂, w₀ + w₁, w₀, in all 8 products instead of 27.
    """
    weight = conv.weight
    for axis in (2, 3, 4):
        before, here, after = weight.unbind(axis)
        weight = torch.stack((after, here + after, before + here, before), axis)
    return F.conv_transpose3d(x, weight.transpose(0, 1), conv.bias, stride=2, padding=1)


def doubled(x: Tensor) -> Tensor:
    """Each voxel repeated along each axis, channels-last: torch's own interpolation on CUDA leaves planes."""
    n, c, d, h, w = x.shape
    voxels = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None].expand(-1, -1, 2, -1, 2, -1, 2, -1)
    return voxels.reshape(n, 2 * d, 2 * h, 2 * w, c).permute(0, 4, 1, 2, 3)


def halved(x: Tensor) -> Tensor:
    """The mean of two voxels along each axis, channels-last: torch's own pooling on CUDA leaves planes."""
    n, c, d, h, w = x.shape
    voxels = x.permute(0, 2, 3, 4, 1).reshape(n, d // 2, 2, h // 2, 2, w // 2, 2, c)
    return voxels.mean(dim=(2, 4, 6)).permute(0, 4, 1, 2, 3)


class SelfAttention(nn.Module):
    """Multi-head attention of (N, L, C) sequences to themselves."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.out_proj = nn.Linear(channels, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (-1, self.head_channels)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class AttentionBlock(nn.Module):
    """x + attention(norm(x)) among all voxels of a volume."""

    def __init__(self, channels: int, head_channels: int, *, groups: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=eps)
        self.attn = SelfAttention(channels, head_channels)

    def forward(self, x: Tensor) -> Tensor:
        voxels = self.norm(x).flatten(2).transpose(1, 2)
        out: Tensor = x + self.attn(voxels).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, each perhaps with attention after it, held under MONAI's names."""

    def __init__(self, blocks: Iterable[tuple[ResidualBlock, AttentionBlock | None]]) -> None:
        super().__init__()
        resnets, attentions = zip(*blocks, strict=True)
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(block for block in attentions if block is not None)

    def block(self, place: int, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the residual block at a place, and the attention after it."""
        x = self.resnets[place](x, emb)
        return self.attentions[place](x) if len(self.attentions) > 0 else x


class DownLevel(Level):
    """Blocks, then on request one that halves the resolution; returns also what the way up is to see."""

    def __init__(
        self, blocks: Iterable[tuple[ResidualBlock, AttentionBlock | None]], downsampler: ResidualBlock | None
    ) -> None:
        super().__init__(blocks)
        self.downsampler = downsampler

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = []
        for place in range(len(self.resnets)):
            x = self.block(place, x, emb)
            seen.append(x)
        if self.downsampler is not None:
            x = self.downsampler(x, emb)
            seen.append(x)
        return x, seen


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, first: ResidualBlock, attention: AttentionBlock, second: ResidualBlock) -> None:
        super().__init__()
        self.resnet_1 = first
        self.attention = attention
        self.resnet_2 = second

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.resnet_2(self.attention(self.resnet_1(x, emb)), emb)
        return out


class UpLevel(Level):
    """Blocks that each see something of the way down beside their input, then on request one that doubles the size."""

    def __init__(
        self, blocks: Iterable[tuple[ResidualBlock, AttentionBlock | None]], upsampler: ResidualBlock | None
    ) -> None:
        super().__init__(blocks)
        self.upsampler = upsampler

    def forward(self, x: Tensor, beside: list[Tensor], emb: Tensor) -> Tensor:
        """`beside` has one tensor a block, the first block's last."""
        for place, seen in enumerate(reversed(beside)):
            x = self.block(place, torch.cat((x, seen), dim=1), emb)
        return x if self.upsampler is None else self.upsampler(x, emb)

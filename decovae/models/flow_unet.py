"""The velocity network of a flow: MAISI's diffusion U-Net, with MONAI's ``state_dict`` key for key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decovae.models.blocks import Named
from decovae.models.conditions import CategoricalCondition, Condition
from decovae.models.flow_blocks import (
    AttentionBlock,
    DownLevel,
    Middle,
    Resample,
    ResidualBlock,
    UpLevel,
    convolution,
    fuses,
    norm_silu_convolution,
)

LONGEST_PERIOD = 10_000
TIMESTEPS = 1000
"""MONAI's timestep of pure noise; data has 0."""


@dataclass(frozen=True)
class FlowUNetConfig:
    """Shape of the U-Net. The defaults are MAISI's.

    Attributes:
        channels: feature channels of each level, finest first; each further level halves the resolution.
        attention: whether the blocks of a level are followed by attention; those in the middle always are.
        residual_blocks: residual blocks a level on the way down; one more on the way up.
        head_channels: channels of an attention head; divides ``channels`` where there is attention, and the last entry.
        groups: groups of every GroupNorm; divides every entry of ``channels``.
        eps: epsilon of every GroupNorm.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    attention: tuple[bool, ...] = (False, False, True, True)
    residual_blocks: int = 2
    head_channels: int = 32
    groups: int = 32
    eps: float = 1e-6

    @property
    def multiple(self) -> int:
        """What the axes of a latent are padded to multiples of."""
        return 2 ** (len(self.channels) - 1)


class FlowUNet(nn.Module):
    """Velocity v(x, t) of latents (N, latent_channels, d, h, w); d, h and w may be any size.

    Without conditions ``state_dict()`` loads strictly into MONAI's ``DiffusionModelUNetMaisi`` with
    ``resblock_updown=True, include_fc=True``, and the other way round, and what it computes is the same.

    Axes that are no multiple of 2^(levels − 1) are padded with zeros at the far end, and the velocity is cropped.

    On CUDA everything is channels-last, and the residual blocks are fused operators that keep no activation between a
    norm and its convolution for backward; how much faster that is has not been measured. On the CPU these and
    channels-last, for all or for the finest level alone, were measured to be no faster than torch's norms in planes.
    What was faster there, a training step by about a tenth, is the convolution after each doubling of the size: 8
    products a voxel instead of 27; and a single volume without gradients, three times, by a convolution that torch does
    not choose by itself. Weights are best left in planes, too. Attention is torch's own operator everywhere.

    Args:
        config: its shape.
        latent_channels: channels of a latent.
        conditions: what it may be conditioned on, embedded and added to the embedding of the time. Their embeddings
            start at zero, those of absence too, so that a network starts as one without conditions.
        fused: compute the residual blocks by fused operators; None does so on CUDA. See `flow_blocks.ResidualBlock`.

    Raises:
        ValueError: on construction, if ``groups`` or ``head_channels`` does not divide the channels, or ``attention``
            has not an entry for every level.
    """

    def __init__(
        self,
        config: FlowUNetConfig | None = None,
        latent_channels: int = 4,
        conditions: Sequence[Condition] = (),
        *,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or FlowUNetConfig()
        self.latent_channels = latent_channels
        self.conditions = tuple(conditions)
        _check(config)
        first, embedding = config.channels[0], 4 * config.channels[0]
        self.conv_in = convolution(latent_channels, first)
        self.time_embed = nn.Sequential(nn.Linear(first, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.down_blocks = nn.ModuleList(_way_down(config))
        last = config.channels[-1]
        self.middle_block = Middle(
            _residual(config, last, last), _attention(config, last), _residual(config, last, last)
        )
        self.up_blocks = nn.ModuleList(_way_up(config))
        self.out = nn.Sequential(
            nn.GroupNorm(config.groups, first, eps=config.eps),
            nn.SiLU(),
            convolution(first, latent_channels, zero=True),
        )
        self.condition_embeddings = nn.ModuleList(_embedding(condition, first, embedding) for condition in conditions)
        self.fused = fused
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.fused = fused

    @property
    def levels(self) -> list[nn.Module]:
        """The parts that are sharded, one at a time in memory: the way down, the middle, the way up."""
        return [*self.down_blocks.children(), self.middle_block, *self.up_blocks.children()]

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The velocity at x, like x in shape.

        Args:
            x: (N, latent_channels, d, h, w), floating point.
            t: (N,) or a scalar, 0 for noise and 1 for data.
            condition: (N, K) rows as of `decovae.generation.conditioning`, NaN for what is absent; None for nothing.

        Raises:
            ValueError: a shape that does not fit.
        """
        if x.ndim != 5 or x.shape[1] != self.latent_channels:
            raise ValueError(f"latents have shape (N, {self.latent_channels}, d, h, w), not {tuple(x.shape)}")
        emb = self.embed(t.expand(x.shape[0]), condition, x.dtype)
        size = x.shape[2:]
        missing = [-length % self.config.multiple for length in size]
        if any(missing):
            x = F.pad(x, [side for length in reversed(missing) for side in (0, length)])
        fused = fuses(self.fused, x)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d) if fused else x)
        seen = [h]
        for level in self.down_blocks:
            h, further = level(h, emb)
            seen += further
        h = self.middle_block(h, emb)
        for level in self.up_blocks:
            blocks = len(cast(UpLevel, level).resnets)
            seen, beside = seen[:-blocks], seen[-blocks:]
            h = level(h, beside, emb)
        if fused:
            norm, _, conv = self.out
            velocity, _ = norm_silu_convolution(h, cast(nn.GroupNorm, norm), cast(Named, conv))
        else:
            velocity = self.out(h)
        return velocity[:, :, : size[0], : size[1], : size[2]]

    def embed(self, t: Tensor, condition: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding (N, 4 · first width) of times (N,) and of conditions (N, K)."""
        emb: Tensor = self.time_embed(sinusoids(TIMESTEPS * (1 - t.float()), self.config.channels[0]).to(dtype))
        if condition is not None and condition.shape != (t.shape[0], len(self.conditions)):
            raise ValueError(
                f"conditions of {t.shape[0]} latents have shape ({t.shape[0]}, {len(self.conditions)}), "
                f"not {tuple(condition.shape)}"
            )
        if self.conditions and condition is None:
            condition = t.new_full((t.shape[0], len(self.conditions)), math.nan)
        for place, embedding in enumerate(self.condition_embeddings):
            assert condition is not None
            emb = emb + embedding(condition[:, place]).to(dtype)
        return emb


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Cosines and sines of values (N,), float32, at periods from 2π to 2π · 10⁴: (N, width)."""
    exponents = torch.arange(width // 2, dtype=torch.float32, device=values.device) / (width // 2)
    angles = values.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=1), (0, width % 2))


class ScalarEmbedding(nn.Module):
    """Embedding of a number in units of its standard deviation; a learned vector where it is NaN."""

    SCALE = 100.0  # as far between two numbers as between times that a flow is to tell apart

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.absent = nn.Parameter(torch.zeros(embedding))
        for parameter in self.mlp[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, values: Tensor) -> Tensor:
        """(N, embedding) of (N,)."""
        absent = values.isnan()
        # Replaced before anything is computed: a NaN that is only masked afterwards would still reach the gradients.
        known = torch.where(absent, 0.0, values)
        features = sinusoids(self.SCALE * known, self.width).to(self.absent.dtype)
        return torch.where(absent[:, None], self.absent, self.mlp(features))


class CategoryEmbedding(nn.Module):
    """Embedding of a category's place among the values; a learned vector where it is NaN."""

    def __init__(self, categories: int, embedding: int) -> None:
        super().__init__()
        self.values = nn.Embedding(categories, embedding)
        self.absent = nn.Parameter(torch.zeros(embedding))
        nn.init.zeros_(self.values.weight)

    def forward(self, values: Tensor) -> Tensor:
        """(N, embedding) of (N,)."""
        absent = values.isnan()
        return torch.where(absent[:, None], self.absent, self.values(torch.where(absent, 0.0, values).long()))


def _check(config: FlowUNetConfig) -> None:
    if not config.channels or any(width % config.groups for width in config.channels):
        raise ValueError(f"groups={config.groups} must divide every one of channels={config.channels}")
    if len(config.attention) != len(config.channels):
        raise ValueError(f"attention={config.attention} must have an entry for each of channels={config.channels}")
    attended = [width for width, has in zip(config.channels, config.attention, strict=True) if has]
    if any(width % config.head_channels for width in (*attended, config.channels[-1])):
        raise ValueError(
            f"head_channels={config.head_channels} must divide those of channels={config.channels} with attention"
        )


def _residual(config: FlowUNetConfig, width_in: int, width: int, resample: Resample | None = None) -> ResidualBlock:
    embedding = 4 * config.channels[0]
    return ResidualBlock(width_in, width, embedding, groups=config.groups, eps=config.eps, resample=resample)


def _attention(config: FlowUNetConfig, width: int) -> AttentionBlock:
    return AttentionBlock(width, config.head_channels, groups=config.groups, eps=config.eps)


def _way_down(config: FlowUNetConfig) -> list[DownLevel]:
    levels = []
    width_in = config.channels[0]
    for place, (width, attended) in enumerate(zip(config.channels, config.attention, strict=True)):
        blocks = []
        for _ in range(config.residual_blocks):
            blocks.append((_residual(config, width_in, width), _attention(config, width) if attended else None))
            width_in = width
        final = place == len(config.channels) - 1
        levels.append(DownLevel(blocks, None if final else _residual(config, width, width, "down")))
    return levels


def _way_up(config: FlowUNetConfig) -> list[UpLevel]:
    levels = []
    below = config.channels[-1]
    finer = (config.channels[0], *config.channels)
    for place in reversed(range(len(config.channels))):
        width, attended = config.channels[place], config.attention[place]
        beside = [width] * config.residual_blocks + [finer[place]]
        blocks = []
        for seen in beside:
            blocks.append((_residual(config, below + seen, width), _attention(config, width) if attended else None))
            below = width
        levels.append(UpLevel(blocks, None if place == 0 else _residual(config, width, width, "up")))
    return levels


def _embedding(condition: Condition, width: int, embedding: int) -> nn.Module:
    if isinstance(condition, CategoricalCondition):
        return CategoryEmbedding(len(condition.values), embedding)
    return ScalarEmbedding(width, embedding)

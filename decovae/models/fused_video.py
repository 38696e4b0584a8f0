"""Forwards of diffusers' blocks for video: the parts of `decovae.models.fused` that only those need."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from decovae.models import patterns
from decovae.models.fused import Fused, ResidualBlock, first_reason
from decovae_kernels import group_norm


def _activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU(norm(x)), of which x is kept alone."""
    return group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class TemporalBlock(ResidualBlock):
    """diffusers' ``TemporalResnetBlock`` without a time embedding; its kernels are (3, 1, 1)."""

    @classmethod
    def _fuse_obstacle(cls, module: nn.Module) -> str | None:
        if getattr(module, "time_emb_proj", None) is not None:
            return "time embedding"
        return first_reason(
            _dropping(module), patterns.silu_obstacle(_activation(module)), super()._fuse_obstacle(module)
        )

    @staticmethod
    def shortcut(block: nn.Module) -> nn.Module | None:
        return cast("nn.Module | None", block.conv_shortcut)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As `ResidualBlock`; there is nothing to do with an embedding."""
        return super().forward(input_tensor)


class CausalBlock(Fused):
    """A residual block of diffusers whose convolutions pad time in their own way: norms and activations are fused."""

    _fused_label = "norms of a causal block"
    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    # Convolutions that return more than a tensor, layers that may be missing.
    conv1: Any
    conv2: Any

    @classmethod
    def _fuse_obstacle(cls, module: nn.Module) -> str | None:
        return first_reason(
            patterns.norm_obstacle(cast(CausalBlock, module).norm1),
            patterns.norm_obstacle(cast(CausalBlock, module).norm2),
            patterns.silu_obstacle(_activation(module)),
            _dropping(module),
        )


class HunyuanBlock(CausalBlock):
    """``HunyuanVideoResnetBlockCausal3D``."""

    conv_shortcut: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, O, T, H, W) of (N, C, T, H, W)."""
        inner: Tensor = self.conv1(_activated(self.norm1, hidden_states))
        out: Tensor = self.conv2(_activated(self.norm2, inner))
        return out + (hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states))


class MagvitBlock(CausalBlock):
    """``EasyAnimateResidualBlock3D``, whose norms may look at each frame alone."""

    shortcut: Any

    def _by_frame(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if not self.spatial_group_norm:
            return _activated(norm, x)
        frames = x.transpose(1, 2).flatten(0, 1)
        return _activated(norm, frames).unflatten(0, (x.shape[0], -1)).transpose(1, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(N, O, T, H, W) of (N, C, T, H, W)."""
        side: Tensor = self.shortcut(hidden_states)
        inner: Tensor = self.conv1(self._by_frame(self.norm1, hidden_states))
        out: Tensor = self.conv2(self._by_frame(self.norm2, inner))
        return (out + side) / cast(float, self.output_scale_factor)


class CogVideoXBlock(CausalBlock):
    """``CogVideoXResnetBlock3D`` with group norms: the encoder's, and a decoder's without spatial norms."""

    conv_shortcut: Any
    nonlinearity: nn.Module
    temb_proj: nn.Module

    def forward(
        self,
        inputs: Tensor,
        temb: Tensor | None = None,
        zq: Tensor | None = None,
        conv_cache: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(N, O, T, H, W) of (N, C, T, H, W), and what the convolutions remember for the next frames."""
        cache: dict[str, Tensor] = {}
        before = conv_cache or {}
        x, cache["conv1"] = self.conv1(_activated(self.norm1, inputs), conv_cache=before.get("conv1"))
        if temb is not None:
            x = x + self.temb_proj(self.nonlinearity(temb))[:, :, None, None, None]
        x, cache["conv2"] = self.conv2(_activated(self.norm2, x), conv_cache=before.get("conv2"))
        if self.in_channels != self.out_channels:
            if self.use_conv_shortcut:
                inputs, cache["conv_shortcut"] = self.conv_shortcut(inputs, conv_cache=before.get("conv_shortcut"))
            else:
                inputs = self.conv_shortcut(inputs)
        return x + inputs, cache


def _activation(module: nn.Module) -> nn.Module:
    return cast(nn.Module, module.nonlinearity)


def _dropping(module: nn.Module) -> str | None:
    return None if patterns.does_nothing(cast(nn.Module, module.dropout)) else "dropout"

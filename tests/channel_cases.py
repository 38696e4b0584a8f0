"""Latents of every shape, dtype, layout and offset, and float64 truths to hold the statistics against."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

IMPLEMENTATIONS = [
    "torch",
    pytest.param(
        "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")
    ),
]

LAYOUTS = ("contiguous", "channels_last", "batch_slice", "channel_slice", "spatial_slice", "transposed", "expanded")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, DECOVAE_KERNELS=name):
        yield


@dataclass(frozen=True)
class Case:
    """A latent, drawn by hypothesis as its description so that a failure is readable."""

    volumes: int
    channels: int
    spatial: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    offset: float
    seed: int

    def latent(self) -> torch.Tensor:
        """Correlated channels of different scales, `offset` standard deviations away from zero."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = torch.randn(self.volumes, self.channels, *self.spatial, generator=generator, dtype=torch.float64)
        common = torch.randn(self.volumes, 1, *self.spatial, generator=generator, dtype=torch.float64)
        shape = (1, -1, *(1 for _ in self.spatial))
        scale = torch.rand(self.channels, generator=generator, dtype=torch.float64).add(0.25).view(shape)
        return arrange(((draw + common + self.offset) * scale).to(DEVICE, self.dtype), self.layout)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x` with the strides that `layout` names; `expanded` repeats the first volume."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "batch_slice":
        return torch.stack([x, x + 1], dim=1).flatten(0, 1)[::2]
    if layout == "channel_slice":
        return torch.cat([x + 1, x], dim=1)[:, x.shape[1] :]
    if layout == "spatial_slice":
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.contiguous()


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    offsets: tuple[float, ...] = (0.0, 3.0, 1000.0, 10_000.0),
) -> Case:
    """At least 32 samples: with fewer, |R| is near 1, where the gradient of R² vanishes and has no relative error."""
    spatial = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    fewest = -(-32 // math.prod(spatial))
    dtype = draw(st.sampled_from(dtypes))
    if dtype == torch.float16:  # up to 65504
        offsets = tuple(offset for offset in offsets if offset <= 1000)
    return Case(
        volumes=draw(st.integers(fewest, fewest + 4)),
        channels=draw(st.integers(1, 16)),
        spatial=spatial,
        dtype=dtype,
        layout=draw(st.sampled_from(LAYOUTS)),
        offset=draw(st.sampled_from(offsets)),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_gradient_close(actual: torch.Tensor, truth: torch.Tensor) -> None:
    """Within 1e-4 of `truth` (float64) in norm, plus what one rounding to the gradient's own dtype may add.

    The allowance is a unit in the last place rather than half, since Triton's interpreter truncates to bfloat16 where
    the hardware rounds; for float32 it is a thousandth of the bound. The floor is for gradients that vanish.
    """
    info = torch.finfo(actual.dtype)
    rounding = (truth.abs() * info.eps + info.tiny * info.eps).norm()
    difference = (actual.double() - truth).norm()
    assert difference <= 1e-4 * truth.norm() + rounding + 1e-12, f"off by {difference / truth.norm():.1e}"

"""What is tuned: every kernel at the shapes it meets.

Shapes are those of the paper: latents of 4 channels at the training patch (24³), of a whole volume, and large; features
of the autoencoder's three levels, channels-last, as it has them. Other numbers of channels come last, at one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bench.tune import latents, norms, upsampling
from bench.tune.work import GROUPS, Recipe, Work

_RECIPES: Mapping[str, Recipe] = {**latents.RECIPES, **norms.RECIPES, **upsampling.RECIPES}

_LATENTS: Mapping[str, tuple[int, ...]] = {
    "training": (2, 4, 24, 24, 24),
    "whole": (1, 4, 32, 64, 32),
    "large": (1, 4, 384, 384, 384),
}
_FEATURES: Mapping[str, tuple[int, ...]] = {
    "level0": (2, 64, 96, 96, 96),
    "level1": (2, 128, 48, 48, 48),
    "level2": (2, 256, 24, 24, 24),
    "whole": (1, 64, 128, 256, 128),
}
# As many planes as a slab of 64 MiB of products has.
_SLABS: Mapping[str, tuple[int, ...]] = {"level2": (1, 256, 8, 24, 24), "level1": (1, 128, 4, 48, 48)}
_UPSAMPLED: Mapping[str, tuple[int, ...]] = {"level2": (2, 256, 24, 24, 24), "level1": (2, 128, 48, 48, 48)}

FUNCTIONS: Mapping[str, str] = {
    "moments": "_moments_kernel",
    "moments_gradient": "_gradient_kernel",
    "moments_dot": "_moments_dot_kernel",
    "moments_gradient_dot": "_gradient_dot_kernel",
    "loss": "_loss_kernel",
    "head": "_head_kernel",
    "head_gradient": "_head_gradient_kernel",
    "norm_add": "_add_kernel",
    "norm_state": "_norm_state_kernel",
    "norm_apply": "_norm_apply_kernel",
    "norm_sums": "_norm_sums_kernel",
    "norm_coefficients": "_norm_coefficients_kernel",
    "norm_gradient": "_norm_gradient_kernel",
    "gather": "_gather_kernel",
    "spread": "_spread_kernel",
    "upsample": "_upsample_kernel",
    "downsample": "_downsample_kernel",
}
"""The Triton function that each configuration launches; that of a slab launches none of its own."""

DTYPES = (torch.bfloat16, torch.float32)
_LATENT_KERNELS = ("moments", "moments_gradient", "head", "head_gradient")
_PASSES = ("norm_add", "norm_apply", "norm_sums", "norm_gradient")

ORDER = (
    "norm_sums", "norm_gradient", "norm_apply", "norm_add", "gather", "spread", "head", "head_gradient", "moments",
    "moments_gradient", "norm_state", "norm_coefficients", "slab", "upsample", "downsample",
    "moments_dot", "moments_gradient_dot", "loss",
)  # fmt: skip
"""The kernels, those that take most of a training step first."""


def works() -> list[Work]:
    """All that is tuned, in the order of its weight: kernels in `ORDER`, bfloat16 before float32, then odd channels."""
    found = [work for kernel in ORDER for dtype in DTYPES for work in _works(kernel, dtype)]
    return sorted(found, key=lambda work: work.shape.startswith("C"))


def _works(kernel: str, dtype: torch.dtype) -> Iterator[Work]:
    def one(shape: str, sizes: tuple[int, ...], layout: str, reads: str, channels: int | None = None) -> Work:
        return Work(
            kernel, shape, sizes, dtype, layout, reads, channels or sizes[1], _RECIPES[kernel],
            kernel in latents.RECIPES,
        )  # fmt: skip

    if kernel in _LATENT_KERNELS:
        for shape, sizes in _LATENTS.items():
            yield one(shape, sizes, "channels_last", "interleaved")
            yield one(shape, sizes, "contiguous", "strided")
        if dtype == torch.bfloat16:
            for channels in (8, 16):
                yield from _other_latents(one, kernel, channels)
    elif kernel in ("moments_dot", "moments_gradient_dot") and dtype == torch.bfloat16:
        for channels in (32, 64):
            yield one(f"C{channels}", (1, channels, 32, 64, 32), "contiguous", "strided")
    elif kernel == "loss" and dtype == torch.float32:
        for channels in (16, 32):
            moments = one(f"C{channels}", (1, channels, 8, 8, 8), "contiguous", "contiguous")
            yield dataclasses.replace(moments, dtype=torch.float64)
    elif kernel in _PASSES:
        for shape, sizes in _FEATURES.items():
            yield one(shape, sizes, "channels_last", "channels_last")
    elif kernel in ("norm_state", "norm_coefficients") and dtype == torch.bfloat16:
        for shape in ("level0", "level1", "level2"):
            sizes = _FEATURES[shape]
            yield one(shape, sizes, "channels_last", "contiguous", sizes[1] // GROUPS)
    elif kernel in ("gather", "spread"):
        for shape, sizes in _SLABS.items():
            yield one(shape, sizes, "channels_last", "channels_last")
    elif kernel in ("slab", "upsample", "downsample"):
        for shape, sizes in _UPSAMPLED.items():
            yield one(shape, sizes, "channels_last", "channels_last")


def _other_latents(one: Any, kernel: str, channels: int) -> Iterator[Work]:
    """Latents of another number of channels, at one shape; the head takes more than 8 in parts of 8."""
    sizes = (1, channels, 32, 64, 32)
    head = kernel.startswith("head")
    if channels == 16 and head:
        return
    planes = (channels == 8 and head) or (channels == 16 and kernel == "moments")
    yield one(f"C{channels}", sizes, "channels_last", "interleaved")
    yield one(f"C{channels}", sizes, "contiguous", "planes" if planes else "strided")

"""Triton kernels with plain torch definitions beside them. Knows torch, NumPy and Triton, nothing else."""

from decovae_kernels._convolution import Geometry
from decovae_kernels.convolution import convolution
from decovae_kernels.group_norm import group_norm
from decovae_kernels.latent_head import latent_head
from decovae_kernels.moments import channel_moments, decorrelation, moments_decorrelation
from decovae_kernels.norm_conv import norm_conv
from decovae_kernels.packed import merge_moments
from decovae_kernels.residual_block import BlockParameters, residual_block
from decovae_kernels.terms import Terms
from decovae_kernels.upsample_conv import upsample_conv

__all__ = [
    "BlockParameters",
    "Geometry",
    "Terms",
    "channel_moments",
    "convolution",
    "decorrelation",
    "group_norm",
    "latent_head",
    "merge_moments",
    "moments_decorrelation",
    "norm_conv",
    "residual_block",
    "upsample_conv",
]

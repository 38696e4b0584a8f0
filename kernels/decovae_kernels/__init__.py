"""Triton kernels with plain torch definitions beside them. Knows torch, NumPy and Triton, nothing else."""

from decovae_kernels.latent_head import latent_head
from decovae_kernels.moments import channel_moments, decorrelation, moments_decorrelation
from decovae_kernels.packed import merge_moments
from decovae_kernels.terms import Terms

__all__ = ["Terms", "channel_moments", "decorrelation", "latent_head", "merge_moments", "moments_decorrelation"]

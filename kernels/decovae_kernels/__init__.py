"""Triton kernels with plain torch definitions beside them. Knows torch and Triton, nothing else of the project."""

from decovae_kernels.moments import channel_moments, merge_moments

__all__ = ["channel_moments", "merge_moments"]

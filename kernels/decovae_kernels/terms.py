"""The decorrelation losses as functions of packed channel moments, with their gradient (Eqs. 3 to 6 of the paper).

With S the scatter, Σ = S / (n − 1) and R_ij = S_ij / √(S_ii S_jj), the derivatives with respect to S are, for i ≠ j,

    SID  (1/C²) Σ_{i≠j} R_ij²             ∂/∂S_ij = 2 R_ij / (C² √(S_ii S_jj)),   ∂/∂S_ii = −2 Σ_{j≠i} R_ij² / (C² S_ii)
    COV  (1/C²) Σ_{i≠j} Σ_ij²             ∂/∂S_ij = 2 Σ_ij / (C² (n − 1))
    VAR  (1/C) Σ_i max(0, γ − √Σ_ii)²     ∂/∂S_ii = −max(0, γ − √Σ_ii) / (C (n − 1) √Σ_ii)
    VAR² (1/C) Σ_i (Σ_ii − γ)²            ∂/∂S_ii = 2 (Σ_ii − γ) / (C (n − 1))
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from decovae_kernels import packed as packing


class Terms(NamedTuple):
    """Weights of a sum of decorrelation losses; VAD is `Terms(covariance=1, variance=1)`."""

    sid: float = 0.0
    covariance: float = 0.0
    variance: float = 0.0
    squared_variance: float = 0.0
    gamma: float = 1.0
    """γ: the standard deviation that `variance` holds, or the variance that `squared_variance` holds."""


def loss_and_direction(packed: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (), float64, and its derivative with respect to `packed`, of the same shape, in plain torch and NumPy.

    A channel of zero variance has zero correlation with every channel and gets a zero derivative, also from VAR, where
    √ has none. Non-finite moments give a non-finite loss.
    """
    # x/0 and 0/0 of constant channels are selected away below, in NumPy with a warning if it is not asked to be quiet.
    with np.errstate(all="ignore"):
        loss, mean, gradient = _evaluate(packing.quick(packed), terms)
        xp = packing.namespace(gradient)
        direction = xp.concatenate([xp.zeros_like(mean[:1]), xp.zeros_like(mean), gradient.reshape(-1)])
    return packing.tensor(loss), packing.tensor(direction)


def _evaluate(packed: packing.Array, terms: Terms) -> tuple[packing.Array, packing.Array, packing.Array]:
    xp = packing.namespace(packed)
    channels = packing.channels_of(packed)
    scatter = packing.scatter_of(packed)
    per_sample = xp.where(packed[0] > 1, 1 / (packed[0] - 1), xp.nan)  # fewer have no covariance
    # An infinite second moment (squares beyond the dtype) must not pass as a channel without correlation: x/∞ = 0.
    second = xp.diagonal(scatter)
    second = xp.where(xp.isinf(second), xp.nan, second)
    constant = second == 0
    identity = _identity(channels, packed)
    # Multiplied, not selected: 0 · NaN keeps a non-finite diagonal visible, even with a single channel.
    off_diagonal = 1 - identity

    loss = 0 * per_sample
    gradient = 0 * identity
    if terms.sid:
        weight = terms.sid / channels**2
        inverse_norm = xp.where(constant, 0.0, 1 / xp.sqrt(second))
        inverse_norms = inverse_norm[:, None] * inverse_norm * off_diagonal
        correlation = scatter * inverse_norms
        squares = (correlation * correlation).sum(1)
        loss = loss + weight * squares.sum()
        gradient = gradient + 2 * weight * (correlation * inverse_norms - identity * (squares * inverse_norm**2))
    if terms.covariance:
        weight = terms.covariance / channels**2
        covariance = scatter * (off_diagonal * per_sample)
        loss = loss + weight * (covariance * covariance).sum()
        gradient = gradient + covariance * (2 * weight * per_sample)
    if terms.variance:
        weight = terms.variance / channels
        deviation = xp.sqrt(second * per_sample)
        shortfall = xp.clip(terms.gamma - deviation, 0, None)
        loss = loss + weight * (shortfall * shortfall).sum()
        gradient = gradient - identity * xp.where(constant, 0.0, weight * per_sample * shortfall / deviation)
    if terms.squared_variance:
        weight = terms.squared_variance / channels
        excess = second * per_sample - terms.gamma
        loss = loss + weight * (excess * excess).sum()
        gradient = gradient + identity * (2 * weight * per_sample * excess)
    return loss, packing.mean_of(packed), gradient


def _identity(channels: int, like: packing.Array) -> packing.Array:
    if isinstance(like, torch.Tensor):
        return torch.eye(channels, dtype=like.dtype, device=like.device)
    return np.eye(channels)

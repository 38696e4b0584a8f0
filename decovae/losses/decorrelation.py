"""Decorrelation losses on the channels of a latent mean: SID, COV, VAR and VAD (Eqs. 3 to 6 of the DeCo-VAE paper).

Every voxel of every volume in the batch is one sample of the C channels; Σ is their unbiased covariance and R their
Pearson correlation. The losses act on the latent mean μ, not on the sampled z:

    from decovae import vad_loss
    loss = reconstruction + 1.0 * vad_loss(mu)

Each takes μ, or the `ChannelMoments` of μ, so that several losses and the telemetry can share one read of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import nn

from decovae.losses.moments import ChannelMoments, name_of, refuse_group, samples_of
from decovae_kernels import Terms, decorrelation, moments_decorrelation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

VarianceForm: TypeAlias = Literal["hinge", "squared"]


def sid_loss(mu: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> torch.Tensor:
    """Scale-invariant decorrelation, (1/C²) Σ_{i≠j} R_ij² (Eq. 3); the paper weighs it with 10.

    A channel of zero variance counts as uncorrelated and gets a zero gradient.

    Args:
        mu: latent mean (N, C, *spatial) or (N, C), any float dtype, any strides; or its moments.
        group: process group whose joint batch the statistics are taken over (see `channel_moments` for the gradient's
            convention), or None for the local batch.

    Returns:
        Scalar, float32; float64 for a float64 tensor. Non-finite input gives a non-finite loss.

    Raises:
        TypeError: `mu` is not a floating-point tensor.
        ValueError: `mu` has fewer than 2 dimensions or fewer than 2 samples, or this rank is not in `group`.
    """
    return _loss(mu, Terms(sid=1.0), group)


def covariance_loss(mu: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> torch.Tensor:
    """Covariance penalty COV, (1/C²) Σ_{i≠j} Σ_ij² (Eq. 4). Arguments, result and errors as in `sid_loss`."""
    return _loss(mu, Terms(covariance=1.0), group)


def variance_loss(
    mu: torch.Tensor | ChannelMoments,
    gamma: float = 1.0,
    *,
    form: VarianceForm = "hinge",
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Variance anchor VAR, (1/C) Σ_i max(0, γ − √Σ_ii)² (Eq. 5).

    Arguments, result and errors as in `sid_loss`, and:

    Args:
        gamma: γ, the standard deviation to hold, in the units of `mu`.
        form: `"hinge"` is Eq. 5; `"squared"` is (1/C) Σ_i (Σ_ii − γ)², which the authors' repository computes.

    Raises:
        ValueError: `gamma` is not a finite number ≥ 0, or `form` is unknown.
    """
    return _loss(mu, _anchor(gamma, form), group)


def vad_loss(
    mu: torch.Tensor | ChannelMoments,
    gamma: float = 1.0,
    *,
    form: VarianceForm = "hinge",
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Variance-anchored decorrelation, COV + VAR (Eq. 6); the paper weighs it with 1.

    Arguments, result and errors as in `variance_loss`.
    """
    return _loss(mu, _anchor(gamma, form)._replace(covariance=1.0), group)


class _DecorrelationLoss(nn.Module):
    """Holds the process group; a group given in the call goes before the one given here."""

    def __init__(self, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.group = group


class SIDLoss(_DecorrelationLoss):
    """`sid_loss` (Eq. 3) as a module."""

    def forward(self, mu: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> torch.Tensor:
        """The loss of the latent mean `mu` (N, C, *spatial): a float32 scalar. See `sid_loss`."""
        return sid_loss(mu, group=group or self.group)


class CovarianceLoss(_DecorrelationLoss):
    """`covariance_loss` (Eq. 4) as a module."""

    def forward(self, mu: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> torch.Tensor:
        """The loss of the latent mean `mu` (N, C, *spatial): a float32 scalar. See `covariance_loss`."""
        return covariance_loss(mu, group=group or self.group)


class _AnchoredLoss(_DecorrelationLoss):
    def __init__(self, gamma: float = 1.0, *, form: VarianceForm = "hinge", group: ProcessGroup | None = None) -> None:
        super().__init__(group=group)
        _anchor(gamma, form)
        self.gamma = gamma
        self.form: VarianceForm = form

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, form={self.form!r}"


class VarianceLoss(_AnchoredLoss):
    """`variance_loss` (Eq. 5) as a module; raises its ValueErrors about options when it is made."""

    def forward(self, mu: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> torch.Tensor:
        """The loss of the latent mean `mu` (N, C, *spatial): a float32 scalar. See `variance_loss`."""
        return variance_loss(mu, self.gamma, form=self.form, group=group or self.group)


class VADLoss(_AnchoredLoss):
    """`vad_loss` (Eq. 6) as a module; raises its ValueErrors about options when it is made."""

    def forward(self, mu: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> torch.Tensor:
        """The loss of the latent mean `mu` (N, C, *spatial): a float32 scalar. See `vad_loss`."""
        return vad_loss(mu, self.gamma, form=self.form, group=group or self.group)


def _loss(mu: torch.Tensor | ChannelMoments, terms: Terms, group: ProcessGroup | None) -> torch.Tensor:
    if isinstance(mu, ChannelMoments):
        refuse_group(group)
        return moments_decorrelation(mu.packed, terms)
    loss = decorrelation(mu, terms, group=name_of(group))
    if group is None:
        samples_of(mu)
    return loss


def _anchor(gamma: float, form: str) -> Terms:
    """The variance term with its options, checked."""
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be a finite number of at least 0, got {gamma!r}")
    if form not in get_args(VarianceForm):
        raise ValueError(f"form must be one of {', '.join(get_args(VarianceForm))}, got {form!r}")
    if form == "squared":
        return Terms(squared_variance=1.0, gamma=gamma)
    return Terms(variance=1.0, gamma=gamma)

"""Channel statistics of a latent batch, of this process or of a whole process group.

Mean and covariance are all that the decorrelation losses and the latent metrics need. They are computed once, by
`channel_moments`, and can be handed to any number of losses and metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from decovae_kernels import channel_moments as packed_moments
from decovae_kernels import merge_moments
from decovae_kernels import packed as packing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ChannelMoments:
    """Count, mean and scatter of C channels over a set of samples; sets can be merged.

    Attributes:
        packed: [count, mean, scatter row by row], (1 + C + C²,), float64.
        samples: the count where it is known without reading it back from the device: of a single process's batch.
    """

    packed: torch.Tensor
    samples: int | None = None

    @property
    def count(self) -> int | torch.Tensor:
        """Number of samples n, one for every voxel of every volume; a 0-dimensional float64 tensor across processes."""
        return self.packed[0] if self.samples is None else self.samples

    @property
    def mean(self) -> torch.Tensor:
        """(C,), float64."""
        mean: torch.Tensor = packing.mean_of(self.packed)
        return mean

    @property
    def scatter(self) -> torch.Tensor:
        """Σ_s (x_s − mean)(x_s − mean)ᵀ, (C, C), float64."""
        scatter: torch.Tensor = packing.scatter_of(self.packed)
        return scatter

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance Σ = scatter / (n − 1), (C, C), float64."""
        return self.scatter / (self.count - 1)

    @property
    def correlation(self) -> torch.Tensor:
        """Pearson correlation R, (C, C), float64.

        A channel of zero variance has zero correlation with every channel, itself included, and passes no gradient.
        A channel whose second moment is not finite (its samples are not, or their squares leave float32) has NaN.
        """
        return normalized(self.scatter)

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Moments of both sets of samples together, as if they had been one tensor."""
        known = self.samples is not None and other.samples is not None
        samples = self.samples + other.samples if known else None  # type: ignore[operator]
        return ChannelMoments(merge_moments(torch.stack([self.packed, other.packed])), samples)

    def detach(self) -> ChannelMoments:
        """The same numbers without their gradient."""
        return ChannelMoments(self.packed.detach(), self.samples)

    def cpu(self) -> ChannelMoments:
        """The same numbers in main memory."""
        return ChannelMoments(self.packed.cpu(), self.samples)


@dataclass(frozen=True)
class ChannelStatistics:
    """What `channel_statistics` returns: `count`, `mean` (C,), `covariance` and `correlation` (C, C), float32."""

    count: int | torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    correlation: torch.Tensor


def channel_moments(mu: torch.Tensor, *, group: ProcessGroup | None = None) -> ChannelMoments:
    """Moments of the channels of `mu`, over all its voxels and volumes, from one read; differentiable once.

    With `group`, the moments of the batches of all its ranks together. Only count, mean and scatter travel
    (C² + C + 1 numbers a rank, one all-gather); batches may differ in size. The backward communicates nothing:
    each rank's gradient is the world size times ∂L/∂mu_local, for the L that all ranks compute alike, so that the
    average over ranks which DDP and FSDP take of the parameters' gradients is the gradient of L.

    Args:
        mu: (N, C, *spatial) or (N, C), float16, bfloat16, float32 or float64, any strides.
        group: a process group that this rank belongs to, or None for the local batch. Every rank of the group has to
            call, with the same C.

    Raises:
        TypeError: `mu` is not a floating-point tensor.
        ValueError: `mu` has fewer than 2 dimensions, or fewer than 2 samples (without a group; a rank of a group may
            have any number), this rank is not in `group`, or its ranks differ in C.
    """
    packed = packed_moments(mu, group=name_of(group))
    return ChannelMoments(packed, samples_of(mu) if group is None else None)


def channel_statistics(z: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> ChannelStatistics:
    """Count, mean, unbiased covariance and Pearson correlation of the channels of `z`, in float32.

    Args and errors as in `channel_moments`; moments that were computed before are taken as they are.
    """
    if isinstance(z, ChannelMoments):
        refuse_group(group)
        moments = z
    else:
        moments = channel_moments(z, group=group)
    return ChannelStatistics(
        moments.count, moments.mean.float(), moments.covariance.float(), moments.correlation.float()
    )


def normalized(second_moments: torch.Tensor) -> torch.Tensor:
    """S_ij / √(S_ii S_jj) of a (C, C) matrix; rows and columns of a channel with S_ii = 0 are zero."""
    second = second_moments.diagonal()
    constant = second == 0
    # The inner `where` keeps 1/√0 out of the backward, whose zero times infinity would be NaN. Infinity must not
    # pass as a channel without correlation either: x/∞ = 0.
    inverse_norm = torch.where(constant, 1.0, second).rsqrt()
    inverse_norm = torch.where(constant, 0.0, torch.where(second.isinf(), torch.nan, inverse_norm))
    return second_moments * inverse_norm[:, None] * inverse_norm


def samples_of(mu: torch.Tensor) -> int:
    """How many samples of the channels `mu` holds; enough of them for a covariance.

    Raises:
        ValueError: there are fewer than 2.
    """
    count = mu.numel() // mu.shape[1]
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {count} from a tensor of shape {tuple(mu.shape)}")
    return count


def name_of(group: ProcessGroup | None) -> str:
    """The name by which the operators know a group; empty for None.

    Raises:
        ValueError: this rank is not in `group`.
    """
    if group is None:
        return ""
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"this process is not in the process group {group!r}: pass a group that it belongs to")
    return group.group_name


def refuse_group(group: ProcessGroup | None) -> None:
    """Raise ValueError for moments together with a group, which they can no longer be gathered from."""
    if group is not None:
        raise ValueError(f"group={group} has no effect on moments: pass it to channel_moments, which computes them")

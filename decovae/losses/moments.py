"""Channel statistics of a latent batch, of this process or of a whole process group.

Mean and covariance are all that the decorrelation losses and the latent metrics need. They are computed once, by
`channel_moments`, and can be handed to any number of losses and metrics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from decovae_kernels import channel_moments as local_moments
from decovae_kernels import merge_moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ChannelMoments:
    """Count, mean and scatter of C channels over a set of samples; sets can be merged.

    Attributes:
        count: number of samples n, one for every voxel of every volume; a 0-dimensional float64 tensor where other
            processes contributed, so that reading it does not wait for the device.
        mean: (C,), float64.
        scatter: Σ_s (x_s − mean)(x_s − mean)ᵀ, (C, C), float64.
    """

    count: int | torch.Tensor
    mean: torch.Tensor
    scatter: torch.Tensor

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
        second = self.scatter.diagonal()
        constant = second == 0
        # The inner `where` keeps 1/√0 out of the backward, whose zero times infinity would be NaN. Infinity must not
        # pass as a channel without correlation either: x/∞ = 0.
        inverse_norm = torch.where(constant, 1.0, second).rsqrt()
        inverse_norm = torch.where(constant, 0.0, torch.where(second.isinf(), torch.nan, inverse_norm))
        return self.scatter * inverse_norm[:, None] * inverse_norm

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Moments of both sets of samples together, as if they had been one tensor."""
        count, mean, scatter = merge_moments(
            torch.stack([_count_tensor(part.count, self.mean) for part in (self, other)]),
            torch.stack([self.mean, other.mean]),
            torch.stack([self.scatter, other.scatter]),
        )
        if isinstance(self.count, int) and isinstance(other.count, int):
            return ChannelMoments(self.count + other.count, mean, scatter)
        return ChannelMoments(count, mean, scatter)


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
            have any number), or this rank is not in `group`.
    """
    mean, scatter = local_moments(mu)
    count = mu.numel() // mu.shape[1]
    if group is not None:
        return _across_ranks(ChannelMoments(count, mean, scatter), group)
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {count} from a tensor of shape {tuple(mu.shape)}")
    return ChannelMoments(count, mean, scatter)


def channel_statistics(z: torch.Tensor | ChannelMoments, *, group: ProcessGroup | None = None) -> ChannelStatistics:
    """Count, mean, unbiased covariance and Pearson correlation of the channels of `z`, in float32.

    Args and errors as in `channel_moments`; moments that were computed before are taken as they are.
    """
    moments = as_moments(z, group)
    return ChannelStatistics(
        moments.count, moments.mean.float(), moments.covariance.float(), moments.correlation.float()
    )


def as_moments(mu: torch.Tensor | ChannelMoments, group: ProcessGroup | None) -> ChannelMoments:
    """The moments of `mu`, or `mu` itself where it is moments.

    Raises:
        ValueError: moments together with a group, which they can no longer be gathered from.
    """
    if not isinstance(mu, ChannelMoments):
        return channel_moments(mu, group=group)
    if group is not None:
        raise ValueError(f"group={group} has no effect on moments: pass it to channel_moments, which computes them")
    return mu


def _count_tensor(count: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return count if isinstance(count, torch.Tensor) else like.new_full((), count)


def _across_ranks(local: ChannelMoments, group: ProcessGroup) -> ChannelMoments:
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"this process is not in the process group {group!r}")
    if dist.get_world_size(group) == 1:
        return ChannelMoments(_count_tensor(local.count, local.mean), local.mean, local.scatter)
    channels = len(local.mean)
    packed = torch.cat([_count_tensor(local.count, local.mean)[None], local.mean, local.scatter.flatten()])
    counts, means, scatters = _GatherRows.apply(packed, group).split([1, channels, channels**2], dim=1)
    return ChannelMoments(*merge_moments(counts[:, 0], means, scatters.unflatten(1, (channels, channels))))


class _GatherRows(torch.autograd.Function):
    """All ranks' vectors as the rows of a matrix; gradient for the own row only, times the world size."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        import torch.distributed as dist

        ctx.rank, ctx.world_size = dist.get_rank(group), dist.get_world_size(group)
        rows = row.new_empty(ctx.world_size * row.numel())
        dist.all_gather_into_tensor(rows, row, group=group)
        return rows.view(ctx.world_size, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0][ctx.rank] * ctx.world_size, None

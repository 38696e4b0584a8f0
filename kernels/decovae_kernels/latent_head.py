"""The latent head: z = μ + σ·ε, the KL divergence and the channel moments of μ from one read of μ and log σ².

decovae::latent_head             (μ, log σ²) → z, KL, packed moments
decovae::latent_head_backward    both gradients; ε is drawn again, not kept
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels import moments_torch, ranks
from decovae_kernels import packed as packing
from decovae_kernels._autograd import differentiable
from decovae_kernels._dispatch import UNCAPTURED, full_precision
from decovae_kernels._layout import sample_blocks
from decovae_kernels.moments import check_latent, product_flops, runs_in_triton
from decovae_kernels.philox import normals

# Elements of a piece of the torch path.
_PIECE = 1 << 18


def latent_head(
    mu: torch.Tensor,
    log_variance: torch.Tensor,
    seed: torch.Tensor,
    *,
    offset: int = 0,
    first: int = 0,
    group: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample, KL divergence and moments of a latent posterior N(μ, σ²); differentiable once.

    Args:
        mu: (N, C, *spatial) or (N, C), float16, bfloat16, float32 or float64; computed in float32, float64 in float64.
        log_variance: log σ², of the same shape on the same device, any of these dtypes.
        seed: (1,) int64 on the same device. The noise is a function of it, of `offset` and of a sample's number alone.
        offset: 0 … 2³²−1, a stream under the same seed.
        first: 0 … 2³²−1, the number of the batch's first volume in whatever sequence the noise belongs to. With S
            samples a volume, `mu` begins at sample first · S of the stream: a batch in parts draws what it draws whole.
        group: as in `channel_moments`, for the moments alone.

    Returns:
        z like `mu`; D_KL(N(μ, σ²) ‖ N(0, 1)) averaged over this process's elements, a scalar, float32 (float64 for
        float64); packed moments of μ (1 + C + C²,), float64.

    Raises:
        TypeError, ValueError: as `channel_moments`, or `log_variance`, `seed`, `offset` or `first` is not as above.
    """
    check_latent(mu)
    check_latent(log_variance)
    if log_variance.shape != mu.shape or log_variance.device != mu.device:
        raise ValueError(
            f"log_variance must be like mu, {tuple(mu.shape)} on {mu.device}, "
            f"got {tuple(log_variance.shape)} on {log_variance.device}"
        )
    if seed.shape != (1,) or seed.dtype != torch.int64 or seed.device != mu.device:
        raise ValueError(
            f"seed must be one int64 of shape (1,) on {mu.device}, "
            f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    if not 0 <= offset < 2**32:
        raise ValueError(f"offset must be at least 0 and below 2**32, got {offset}")
    if not 0 <= first < 2**32:
        raise ValueError(f"first must be at least 0 and below 2**32, got {first}")
    z, kl, packed = _call_latent_head(mu, log_variance, seed, offset, first * math.prod(mu.shape[2:]), group)
    return z, kl, packed


@torch.library.custom_op("decovae::latent_head", mutates_args=(), tags=UNCAPTURED)
def _latent_head(
    mu: torch.Tensor, log_variance: torch.Tensor, seed: torch.Tensor, offset: int, start: int, group: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = torch.empty_like(mu)
    if mu.numel() == 0:
        packed = mu.new_zeros(packing.size(mu.shape[1]), dtype=torch.float64)
        return z, mu.new_full((), torch.nan, dtype=_kl_dtype(mu)), ranks.merge_across(packed, group)
    blocks = _common_blocks(mu, log_variance, z)
    if blocks is None:
        # Strides that differ, or that no view can flatten: one copy of each.
        result = _latent_head(mu.contiguous(), log_variance.contiguous(), seed, offset, start, group)
        return z.copy_(result[0]), *result[1:]
    source, spread, target = blocks
    if _both_run_in_triton(mu, log_variance):
        from decovae_kernels import latent_head_triton

        kl, packed = latent_head_triton.forward(source, spread, target, seed, offset, start)
    else:
        with full_precision(mu):
            kl = _forward_torch(source, spread, target, seed, offset, start)
            packed = moments_torch.moments(source)
    return z, kl.to(_kl_dtype(mu)), ranks.merge_across(packed, group)


@_latent_head.register_fake
def _(
    mu: torch.Tensor, log_variance: torch.Tensor, seed: torch.Tensor, offset: int, start: int, group: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = mu.new_empty(packing.size(mu.shape[1]), dtype=torch.float64)
    return torch.empty_like(mu), mu.new_empty((), dtype=_kl_dtype(mu)), packed


@torch.library.custom_op("decovae::latent_head_backward", mutates_args=())
def _latent_head_backward(
    mu: torch.Tensor,
    log_variance: torch.Tensor,
    seed: torch.Tensor,
    offset: int,
    start: int,
    packed: torch.Tensor,
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_packed: torch.Tensor | None,
    replicas: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """∂/∂μ = g_z + g_kl μ / m + moments' part, ∂/∂log σ² = ½ (g_z σ ε + g_kl (σ² − 1) / m), m elements."""
    grads = torch.empty_like(mu), torch.empty_like(log_variance)
    if mu.numel() == 0:
        return grads
    given = () if grad_z is None else (grad_z,)
    blocks = _common_blocks(mu, log_variance, *grads, *given)
    if blocks is None:
        plain = (x.contiguous() for x in (mu, log_variance))
        grad_z = None if grad_z is None else grad_z.contiguous()
        found = _latent_head_backward(*plain, seed, offset, start, packed, grad_z, grad_kl, grad_packed, replicas)
        return grads[0].copy_(found[0]), grads[1].copy_(found[1])
    source, spread, out_mu, out_spread = blocks[:4]
    upstream = blocks[4] if given else None
    if _both_run_in_triton(mu, log_variance):
        from decovae_kernels import latent_head_triton

        latent_head_triton.backward(
            source, spread, upstream, out_mu, out_spread, seed, offset, start, packed, grad_kl, grad_packed, replicas
        )
        return grads
    with full_precision(mu):
        if grad_packed is None:
            out_mu.zero_()
        else:
            moments_torch.input_gradient(source, packed, grad_packed, replicas, out=out_mu)
        _backward_torch(source, spread, upstream, out_mu, out_spread, seed, offset, start, grad_kl)
    return grads


@_latent_head_backward.register_fake
def _(
    mu: torch.Tensor,
    log_variance: torch.Tensor,
    seed: torch.Tensor,
    offset: int,
    start: int,
    packed: torch.Tensor,
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_packed: torch.Tensor | None,
    replicas: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(mu), torch.empty_like(log_variance)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    mu, log_variance, seed, ctx.offset, ctx.start, ctx.group = inputs
    ctx.save_for_backward(mu, log_variance, seed, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    mu, log_variance, seed, packed = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return (None,) * 6
    replicas = ranks.world_size(ctx.group)
    found = _latent_head_backward(mu, log_variance, seed, ctx.offset, ctx.start, packed, *grads, replicas)
    return *found, None, None, None, None


_call_latent_head = differentiable(_latent_head, _save, _backward)

register_flop_formula(torch.ops.decovae.latent_head)(product_flops)


@register_flop_formula(torch.ops.decovae.latent_head_backward)
def _backward_flops(shape: torch.Size, *others: Any, **_: Any) -> int:
    grad_packed = others[7]
    return 0 if grad_packed is None else product_flops(shape)


def _both_run_in_triton(mu: torch.Tensor, log_variance: torch.Tensor) -> bool:
    return runs_in_triton(mu) and log_variance.dtype != torch.float64


def _kl_dtype(mu: torch.Tensor) -> torch.dtype:
    return torch.float64 if mu.dtype == torch.float64 else torch.float32


def _common_blocks(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """All as (B, C, L) views that number their samples alike, or None where that takes a copy."""
    views = [sample_blocks(x) for x in tensors]
    first = views[0]
    if first is None:
        return None
    found = [view for view in views if view is not None and view.shape == first.shape]
    return tuple(found) if len(found) == len(views) else None


def _pieces(blocks: torch.Tensor) -> list[tuple[int, int, int]]:
    """Volume, first sample and end of pieces that tile `blocks` (B, C, L)."""
    volumes, channels, length = blocks.shape
    step = max(_PIECE // channels, 1)
    return [(b, start, min(start + step, length)) for b in range(volumes) for start in range(0, length, step)]


def _forward_torch(
    mu: torch.Tensor, log_variance: torch.Tensor, z: torch.Tensor, seed: torch.Tensor, offset: int, start: int
) -> torch.Tensor:
    """Write z; return the KL divergence, float64."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=mu.device)
    for b, low, high in _pieces(mu):
        here = b, slice(None), slice(low, high)
        mean, spread = mu[here].to(dtype), log_variance[here].to(dtype)
        epsilon = normals(seed, offset, start + b * mu.shape[2] + low, high - low, mu.shape[1])
        z[here] = mean + (0.5 * spread).exp() * epsilon
        total += (mean.square() + spread.exp() - spread - 1).sum(dtype=torch.float64)
    return total * (0.5 / mu.numel())


def _backward_torch(
    mu: torch.Tensor,
    log_variance: torch.Tensor,
    grad_z: torch.Tensor | None,
    out_mu: torch.Tensor,
    out_spread: torch.Tensor,
    seed: torch.Tensor,
    offset: int,
    start: int,
    grad_kl: torch.Tensor | None,
) -> None:
    """Add z's and the KL's part to `out_mu`, and write `out_spread`."""
    dtype = torch.promote_types(mu.dtype, torch.float32)
    weight = None if grad_kl is None else grad_kl.to(dtype) / mu.numel()
    for b, low, high in _pieces(mu):
        here = b, slice(None), slice(low, high)
        spread = log_variance[here].to(dtype)
        along_mu, along_spread = out_mu[here].to(dtype), torch.zeros_like(spread)
        if grad_z is not None:
            upstream = grad_z[here].to(dtype)
            epsilon = normals(seed, offset, start + b * mu.shape[2] + low, high - low, mu.shape[1])
            along_mu = along_mu + upstream
            along_spread += 0.5 * upstream * (0.5 * spread).exp() * epsilon
        if weight is not None:
            along_mu = along_mu + weight * mu[here].to(dtype)
            along_spread += (0.5 * weight) * spread.expm1()
        out_mu[here], out_spread[here] = along_mu, along_spread

"""Group norm and SiLU in plain torch, for CPUs and float64: `group_norm_triton` on torch's own kernels.

A volume normalised by given numbers a channel is torch's batch norm of a batch of one, in evaluation mode. Its kernels
are as fast channels-last as in planes, which those of torch's group norm are not, and convolutions are faster
channels-last. Statistics do not travel here. The state is the groups' (mean, rstd), (N, 2, G).
"""

from __future__ import annotations

import torch

from decovae_kernels._dispatch import without_memory
from decovae_kernels._norm import Carry, Norm

FOLDS_BIAS = False


def normalize(
    x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(γ x̂ + β) and the state. There are no `statistics`, and no `shift`: convolutions add their bias here."""
    found = state(x, statistics, shift, norm)
    return apply(x, found, norm), found


def state(x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """The state alone."""
    volumes, channels = x.shape[:2]
    if without_memory(x):  # for which torch knows no batch_norm_update_stats
        return x.new_empty((volumes, 2, norm.groups), dtype=_wide(x))
    # Given where results go, torch leaves them in float32 when x has 16 bits; with momentum 0 nothing goes there.
    aside = x.new_zeros(2, channels, dtype=_wide(x))
    per_channel = [torch.batch_norm_update_stats(x[n : n + 1], aside[0], aside[1], 0.0) for n in range(volumes)]
    mean, variance = (torch.stack(parts).unflatten(1, (norm.groups, -1)) for parts in zip(*per_channel, strict=True))
    centre = mean.mean(2, keepdim=True)
    variance = (variance + (mean - centre).square()).mean(2)
    return torch.stack((centre.squeeze(2), (variance + norm.eps).rsqrt()), dim=1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_channel(x: torch.Tensor, state: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, ...]:
    """Mean and rstd (N, C), γ and β (C,), all of one dtype."""
    mean, rstd = (part.repeat_interleave(x.shape[1] // norm.groups, dim=1) for part in state.unbind(1))
    return mean, rstd, norm.weight.to(state.dtype), norm.bias.to(state.dtype)


def _affine(x: torch.Tensor, state: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    """γ x̂ + β, written to `out`."""
    mean, rstd, weight, bias = _per_channel(x, state, norm)
    variance, unused = rstd.pow(-2), state.new_empty(0)
    for n in range(x.shape[0]):
        torch.ops.aten.native_batch_norm.out(
            x[n : n + 1], weight, bias, mean[n], variance[n], False, 0.0, 0.0,
            out=out[n : n + 1], save_mean=unused, save_invstd=unused,
        )  # fmt: skip
    return out


def apply(x: torch.Tensor, state: torch.Tensor, norm: Norm, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(γ x̂ + β) of x or of some of its planes, in its dtype, written to `out` or to a new tensor."""
    return _activated(_affine(x, state, norm, torch.empty_like(x) if out is None else out), norm)


def _activated(y: torch.Tensor, norm: Norm) -> torch.Tensor:
    return torch.nn.functional.silu(y, inplace=True) if norm.silu else y


def add(
    left: torch.Tensor | None,
    right: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    out: torch.Tensor | None,
    statistics: bool,
) -> torch.Tensor:
    """Write left + right to `out`, which may be either; no statistics, and no `bias`: see `normalize`."""
    if left is not None:
        torch.add(left, right, out=out)
    elif out is not None and out is not right:
        out.copy_(right)
    return right.new_empty((right.shape[0], 0, 3, right.shape[1]), dtype=torch.float32)


def begin_gradient(
    grad: torch.Tensor, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, activation: bool
) -> tuple[Carry, torch.Tensor]:
    """The gradient with respect to γ x̂ + β; on request, act(γ x̂ + β) once more (else empty)."""
    if not norm.silu and not activation:
        return (grad,), x.new_empty(0)
    z = _affine(x, state, norm, torch.empty_like(x))
    dz = torch.ops.aten.silu_backward(grad, z) if norm.silu else grad
    return (dz,), _activated(z, norm) if activation else x.new_empty(0)


def finish_gradient(
    carry: Carry, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, other: torch.Tensor | None, over: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, plus `other`, and of γ, β and the bias that a convolution added to x."""
    (dz,) = carry
    volumes, channels = x.shape[:2]
    mean, rstd, weight, _ = _per_channel(x, state, norm)
    sums = [
        torch.ops.aten.native_batch_norm_backward(
            dz[n : n + 1], x[n : n + 1], weight, None, None, mean[n], rstd[n], True, 0.0, [False, True, True]
        )[1:]
        for n in range(volumes)
    ]
    along_weight, along_bias = (torch.stack(parts) for parts in zip(*sums, strict=True))  # Σ dz·x̂ and Σ dz, (N, C)
    elements = x.numel() // (volumes * norm.groups)
    slope, offset = (
        (weight * part)
        .unflatten(1, (norm.groups, -1))
        .sum(2)
        .div(elements)
        .repeat_interleave(channels // norm.groups, 1)
        for part in (along_weight, along_bias)
    )
    # rstd (γ dz − mean(γ dz) − x̂ mean(γ dz·x̂)), sorted by what it multiplies.
    along_x = dz * _spread(rstd * weight, x)
    along_x.addcmul_(x.to(along_x.dtype), _spread(-rstd.square() * slope, x))
    along_x.add_(_spread(rstd * (rstd * slope * mean - offset), x))
    along_shift = along_x.sum(dim=[0, *range(2, x.ndim)])
    if other is not None:
        along_x.add_(other)
    return along_x.to(x.dtype), along_weight.sum(0), along_bias.sum(0), along_shift


def _spread(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(N, C) → (N, C, 1, 1, …)."""
    return factor.view(*factor.shape, *[1] * (x.ndim - 2))

"""Group norm and SiLU in plain torch, for CPUs and float64: `group_norm_triton` on torch's own kernels.

Statistics do not travel here: torch's group norm takes them on its way. The state is its (mean, rstd), (N, 2, G).
"""

from __future__ import annotations

import torch

from decovae_kernels._norm import Carry, Norm

FOLDS_BIAS = False


def _parameters(norm: Norm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """γ and β in a dtype that torch's group norm takes beside `x`: on the CPU float32 may stand beside 16 bits."""
    kind = x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    return norm.weight.to(kind), norm.bias.to(kind)


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x[0, 0].numel()


def normalize(
    x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(γ x̂ + β) and the state. There are no `statistics`, and no `shift`: convolutions add their bias here."""
    y, mean, rstd = _native(x, norm)
    return _activated(y, norm), torch.stack((mean, rstd), dim=1)


def _native(x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.native_group_norm(x, *_parameters(norm, x), *_sizes(x), norm.groups, norm.eps)


def _activated(y: torch.Tensor, norm: Norm) -> torch.Tensor:
    return torch.nn.functional.silu(y, inplace=True) if norm.silu else y


def state(x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """The state alone."""
    grouped = x.unflatten(1, (norm.groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped.to(torch.promote_types(x.dtype, torch.float32)), dim=2, correction=0)
    return torch.stack((mean, (variance + norm.eps).rsqrt()), dim=1)


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


def apply(x: torch.Tensor, state: torch.Tensor, norm: Norm, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(γ x̂ + β) in the dtype of `x`: of some planes, written to `out`, or of all of x, to a new tensor."""
    if out is None:
        # With its statistics once more, which costs less than torch's products of tensors of two shapes or dtypes.
        return _activated(_native(x, norm)[0], norm)
    volumes, channels = x.shape[:2]
    mean, rstd = (part.repeat_interleave(channels // norm.groups, dim=1) for part in state.unbind(1))
    scale = rstd * norm.weight
    shape = (volumes, channels, *[1] * (x.ndim - 2))
    y = (x.to(scale.dtype) * scale.view(shape)).add_((norm.bias - mean * scale).view(shape))
    return out.copy_(_activated(y, norm))


def begin_gradient(
    grad: torch.Tensor, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, activation: bool
) -> tuple[Carry, torch.Tensor]:
    """The gradient with respect to γ x̂ + β; on request, act(γ x̂ + β) once more (else empty)."""
    z = _native(x, norm)[0]
    dz = torch.ops.aten.silu_backward(grad, z) if norm.silu else grad
    if not activation:
        return (dz,), x.new_empty(0)
    return (dz,), _activated(z, norm)


def finish_gradient(
    carry: Carry, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, other: torch.Tensor | None, over: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, plus `other`, and of γ, β and the bias that a convolution added to x."""
    (dz,) = carry
    weight, _ = _parameters(norm, x)
    mean, rstd = (part.contiguous() for part in state.unbind(1))
    along_x, along_weight, along_bias = torch.ops.aten.native_group_norm_backward(
        dz, x, mean, rstd, weight, *_sizes(x), norm.groups, [True, True, True]
    )
    along_shift = along_x.sum(dim=[0, *range(2, x.ndim)])
    return along_x if other is None else along_x.add_(other), along_weight, along_bias, along_shift

"""Group norm and SiLU as one operator that keeps nothing but its input and its statistics.

decovae::group_norm             x, γ, β → act(γ x̂ + β), state
decovae::group_norm_backward    the gradients; the activation's input is computed again
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels._arguments import check_norm
from decovae_kernels._autograd import differentiable
from decovae_kernels._launch import self_describing
from decovae_kernels._layout import dense
from decovae_kernels._norm import Norm, kernels_for


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """SiLU(GroupNorm(x + shift)), computed in float32 (float64 in float64); differentiable once.

    Args:
        x: (N, C, *spatial), float16, bfloat16, float32 or float64, any strides; one pass fewer where it is contiguous
            or channels-last.
        weight, bias: γ and β, (C,), any floating-point dtype.
        groups: divides C.
        eps: added to the variance.
        silu: False leaves the activation out.
        shift: (C,), the bias of the convolution before, if that did not add it.

    Returns:
        Like `x`, in its dtype. Kept for backward: `x`, and three numbers a volume and channel.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: fewer than two axes, or parameters of another size.
    """
    if not x.is_floating_point():
        raise TypeError(f"group_norm takes floating-point features, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"group_norm takes features of shape (N, C, *spatial), got {tuple(x.shape)}")
    check_norm("group_norm", x.shape[1], weight, bias, groups)
    if shift is not None and shift.shape != weight.shape:
        raise ValueError(f"group_norm: shift must have shape {tuple(weight.shape)}, got {tuple(shift.shape)}")
    y: torch.Tensor = _call(x, weight, bias, shift, groups, eps, silu)[0]
    return y


@self_describing
@torch.library.custom_op("decovae::group_norm", mutates_args=())
def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x), x.new_empty(0)
    kernels = kernels_for(x)
    return kernels.normalize(_shifted(x, shift), None, shift, Norm(weight, bias, groups, eps, silu))


@self_describing
@torch.library.custom_op("decovae::group_norm_backward", mutates_args=())
def _group_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.numel() == 0:
        none = torch.zeros_like(weight)
        return torch.empty_like(x), none, torch.zeros_like(bias), none.clone()
    kernels = kernels_for(x)
    norm = Norm(weight, bias, groups, eps, silu)
    x = _shifted(x, shift)
    carry, _ = kernels.begin_gradient(grad, x, state, norm, activation=False)
    along_x, along_weight, along_bias, along_shift = kernels.finish_gradient(
        carry, x, state, norm, other=None, over=False
    )
    along_shift = along_shift.to(weight.dtype if shift is None else shift.dtype)
    return along_x, along_weight.to(weight.dtype), along_bias.to(bias.dtype), along_shift


def _shifted(x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """`x` as the kernels read it: with its shift added where they do not fold it into the norm."""
    if shift is None or kernels_for(x).FOLDS_BIAS:
        return dense(x)
    return dense(x + shift.to(x.dtype).view(-1, *[1] * (x.ndim - 2)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, shift, ctx.groups, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, output[1], weight, bias, shift)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, state, weight, bias, shift = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    found = _group_norm_backward(grad, x, state, weight, bias, shift, ctx.groups, ctx.eps, ctx.silu)
    return *found[:3], None if shift is None else found[3], None, None, None


_call = differentiable(_group_norm, _save, _backward)


# No products: torch counts none for its own norm either.
@register_flop_formula([torch.ops.decovae.group_norm, torch.ops.decovae.group_norm_backward])
def _flops(*_: Any, **__: Any) -> int:
    return 0

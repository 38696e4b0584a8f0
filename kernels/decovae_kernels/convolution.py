"""A convolution that keeps its input alone, and leaves the statistics of its output to the norm after it.

decovae::convolution             x → conv(pad(x)), its channel statistics
decovae::convolution_backward    all gradients; a padded copy of x is made again, not kept
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels import _convolution as conv
from decovae_kernels._arguments import check_convolution, checked_input
from decovae_kernels._autograd import differentiable
from decovae_kernels._convolution import Geometry
from decovae_kernels._launch import self_describing
from decovae_kernels._norm import kernels_for


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    geometry: Geometry = conv.SAME,
    far_padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A 3D convolution with zero padding; differentiable once.

    Under autocast `x` is cast as torch's convolution would cast it; weights may have another dtype than `x`.

    Args:
        x: (N, C, D, H, W), floating point, any strides.
        weight, bias: (O, C / geometry.groups, kD, kH, kW) and (O,).
        geometry: stride, padding on both sides of an axis, dilation and groups.
        far_padding: further zeros at the far end of every axis, as MAISI pads before it halves the resolution.

    Returns:
        The convolution, and its channel statistics (N, P, 3, O) for the norm after it, P = 0 where that takes its own.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: a shape that does not fit.
    """
    x = checked_input(x, "convolution")
    check_convolution("convolution", x.shape[1], weight, bias, geometry.groups)
    walk = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups)
    y, statistics = _call(conv.arranged(x), weight, bias, *walk, far_padding)
    return y, statistics


@self_describing
@torch.library.custom_op("decovae::convolution", mutates_args=())
def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    far_padding: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    kernels = kernels_for(x)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    folded, added = (bias, None) if kernels.FOLDS_BIAS else (None, bias)
    y = conv.convolve(_padded(x, far_padding), weight, added, geometry)
    return y, kernels.add(None, y, folded, out=y, statistics=True)


@self_describing
@torch.library.custom_op("decovae::convolution_backward", mutates_args=())
def _convolution_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    far_padding: int,
    needs_input_gradient: bool,
) -> list[torch.Tensor]:
    """Gradients of x (empty if it needs none), the weight and, if there is one, the bias."""
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    grad = conv.arranged(grad)
    padded = _padded(x, far_padding)
    found = [conv.weight_gradient(grad, padded, weight, geometry)]
    if bias is not None:
        found.append(conv.bias_gradient(grad, bias))
    if not needs_input_gradient:
        return [x.new_empty(0), *found]
    along = conv.input_gradient(grad, padded, weight, geometry)
    if far_padding:
        depth, height, width = x.shape[2:]
        along = conv.arranged(along[:, :, :depth, :height, :width])
    return [along, *found]


def _padded(x: torch.Tensor, far_padding: int) -> torch.Tensor:
    return F.pad(x, (0, far_padding) * 3) if far_padding else x


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.options = inputs[3:]
    ctx.save_for_backward(*inputs[:3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[0]
    along_x, along_weight, *bias = _convolution_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return along_x if needs else None, along_weight, bias[0] if bias else None, *[None] * 5


_call = differentiable(_convolution, _save, _backward)


@register_flop_formula(torch.ops.decovae.convolution)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv.flops(x, weight, tuple(out_shape[0][2:]))


@register_flop_formula(torch.ops.decovae.convolution_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, weight: torch.Size, *options: Any, **_: Any) -> int:
    return conv.flops(x, weight, tuple(grad[2:])) * (2 if options[-1] else 1)

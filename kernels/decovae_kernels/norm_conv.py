"""Group norm, SiLU and a convolution as one operator; the activation between them is not kept but computed again.

decovae::norm_conv             x → conv(act(γ x̂ + β)), its channel statistics, the norm's state
decovae::norm_conv_backward    all gradients; no convolution runs twice
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels import _convolution as conv
from decovae_kernels._arguments import check_convolution, check_norm, checked_input, wants_gradient
from decovae_kernels._autograd import differentiable
from decovae_kernels._convolution import Geometry
from decovae_kernels._launch import self_describing
from decovae_kernels._norm import Norm, kernels_for

TILE_BYTES = 128 << 20
"""Size of a block's temporaries where no gradient is wanted; larger ones are computed in slabs."""


def norm_conv(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    groups: int,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    silu: bool = True,
    geometry: Geometry = conv.SAME,
    statistics: torch.Tensor | None = None,
    tile_bytes: int = TILE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """conv(SiLU(GroupNorm(x))); differentiable once.

    Under autocast `x` is cast as a convolution's input would be; weights may have another dtype than `x`.

    Args:
        x: (N, C, D, H, W), floating point, any strides.
        norm_weight, norm_bias, groups, eps: the norm's.
        weight, bias: (O, C / geometry.groups, kD, kH, kW) and (O,), the convolution's.
        silu: False leaves the activation out.
        geometry: stride, zero padding, dilation and groups of the convolution.
        statistics: channel statistics of `x` as another block returned them; taken here if there are none.
        tile_bytes: without a gradient, larger temporaries are cut into slabs; 0 never cuts.

    Returns:
        The convolution, and its channel statistics (N, P, 3, O) for the norm after it, P = 0 where that takes its own.
        Kept for backward: `x`, and three numbers a volume and channel.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: a shape that does not fit.
    """
    x = checked_input(x, "norm_conv")
    check_norm("norm_conv", x.shape[1], norm_weight, norm_bias, groups)
    check_convolution("norm_conv", x.shape[1], weight, bias, geometry.groups)
    tile_bytes = 0 if wants_gradient(x, norm_weight, norm_bias, weight, bias) else tile_bytes
    walk = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups)
    y, found, _ = _call(
        conv.arranged(x), statistics, norm_weight, norm_bias, weight, bias, groups, eps, silu, *walk, tile_bytes
    )
    return y, found


@self_describing
@torch.library.custom_op("decovae::norm_conv", mutates_args=())
def _norm_conv(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    conv_groups: int,
    tile_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels = kernels_for(x)
    norm = Norm(norm_weight, norm_bias, groups, eps, silu)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), conv_groups)
    folded = bias if kernels.FOLDS_BIAS else None
    added = None if kernels.FOLDS_BIAS else bias
    if conv.fits(x, geometry, tile_bytes):
        a, state = kernels.normalize(x, statistics, None, norm)
        y = conv.convolve(a, weight, added, geometry)
        return y, kernels.add(None, y, folded, out=y, statistics=True), state
    state = kernels.state(x, statistics, None, norm)
    spatial = conv.output_size(x.shape[2:], weight.shape[2:], geometry)
    y = conv.empty_like_features(x, (x.shape[0], weight.shape[0], *spatial))
    slabs = conv.normalized_slabs(kernels, x, state, norm, weight, added, geometry, tile_bytes)
    for slab, part in slabs:
        kernels.add(None, part, folded, out=slab.of(y), statistics=False)
        del part
    return y, kernels.add(None, y, None, out=None, statistics=True), state


@self_describing
@torch.library.custom_op("decovae::norm_conv_backward", mutates_args=())
def _norm_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    state: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    conv_groups: int,
    needs_parameters: bool,
) -> list[torch.Tensor]:
    """Gradients of x, γ, β and, where they are needed, of the weight and, if there is one, of the bias."""
    kernels = kernels_for(x)
    norm = Norm(norm_weight, norm_bias, groups, eps, silu)
    geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), conv_groups)
    grad = conv.arranged(grad)
    along_a = conv.input_gradient(grad, x, weight, geometry)
    carry, a = kernels.begin_gradient(along_a, x, state, norm, activation=needs_parameters)
    along_weight = conv.weight_gradient(grad, a, weight, geometry) if needs_parameters else x.new_empty(0)
    del along_a, a
    along_x, along_gamma, along_beta, _ = kernels.finish_gradient(carry, x, state, norm, other=None, over=True)
    found = [along_x, along_gamma.to(norm_weight.dtype), along_beta.to(norm_bias.dtype), along_weight]
    return found if bias is None or not needs_parameters else [*found, conv.bias_gradient(grad, bias)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, _, *parameters = inputs[:6]
    ctx.options = inputs[6:13]
    ctx.save_for_backward(x, output[2], *parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    needed = ctx.needs_input_grad[2:6]
    along_x, *others = _norm_conv_backward(grad, *ctx.saved_tensors, *ctx.options, any(needed))
    others += [None] * (4 - len(others))
    along = (found if needs else None for found, needs in zip(others, needed, strict=True))
    return along_x, None, *along, *[None] * 8


_call = differentiable(_norm_conv, _save, _backward)


@register_flop_formula(torch.ops.decovae.norm_conv)
def _flops(x: torch.Size, *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return conv.flops(x, shapes[3], tuple(out_shape[0][2:]))


@register_flop_formula(torch.ops.decovae.norm_conv_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, *shapes: Any, **_: Any) -> int:
    return (2 if shapes[-1] else 1) * conv.flops(x, shapes[3], tuple(grad[2:]))

"""A residual block as one operator: x + conv₂(silu(norm₂(conv₁(silu(norm₁(x)))))), with a 1×1×1 shortcut on request.

decovae::residual_block             x → the block's output, its channel statistics, what the backward keeps
decovae::residual_block_backward    all gradients, the residual's added on the way

Kept for backward: x and, unless memory is tight, the output of conv₁; everything else is computed again by the passes
that read these anyway. On the Triton path no convolution adds its bias: norm₂ folds that of conv₁, the residual sum the
others, and the pass that writes the sum takes the statistics of what it writes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels import _convolution as conv
from decovae_kernels._arguments import check_convolution, check_norm, checked_input, wants_gradient
from decovae_kernels._autograd import differentiable
from decovae_kernels._convolution import POINTWISE, SAME
from decovae_kernels._launch import self_describing
from decovae_kernels._norm import Kernels, Norm, kernels_for
from decovae_kernels.norm_conv import TILE_BYTES


class BlockParameters(NamedTuple):
    """Parameters of a residual block from C to O channels, in any floating-point dtypes.

    The norms' are (C,) and (O,), the convolutions' (O, C, 3, 3, 3) and (O, O, 3, 3, 3), the shortcut's (O, C, 1, 1, 1),
    biases (O,). Without a shortcut C = O.
    """

    norm1_weight: torch.Tensor
    norm1_bias: torch.Tensor
    conv1_weight: torch.Tensor
    conv1_bias: torch.Tensor | None
    norm2_weight: torch.Tensor
    norm2_bias: torch.Tensor
    conv2_weight: torch.Tensor
    conv2_bias: torch.Tensor | None
    shortcut_weight: torch.Tensor | None
    shortcut_bias: torch.Tensor | None


def residual_block(
    x: torch.Tensor,
    parameters: BlockParameters,
    groups: tuple[int, int],
    eps: tuple[float, float],
    *,
    tight: bool = False,
    statistics: torch.Tensor | None = None,
    tile_bytes: int = TILE_BYTES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's output and its channel statistics; differentiable once.

    Under autocast `x` is cast as a convolution's input would be; weights may have another dtype than `x`.

    Args:
        x: (N, C, D, H, W), floating point, any strides.
        parameters: see `BlockParameters`.
        groups, eps: of the two norms.
        tight: keep the block's input only, and run its first convolution a second time in backward.
        statistics: channel statistics of `x` as another block returned them; taken here if there are none.
        tile_bytes: without a gradient, larger temporaries are cut into slabs; 0 never cuts.

    Returns:
        (N, O, D, H, W), and its channel statistics (N, P, 3, O) for the norm after it, P = 0 where that takes its own.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: a shape that does not fit.
    """
    p = parameters
    x = checked_input(x, "residual_block")
    inner = p.conv1_weight.shape[0]
    check_norm("residual_block, first norm", x.shape[1], p.norm1_weight, p.norm1_bias, groups[0])
    check_convolution("residual_block, first convolution", x.shape[1], p.conv1_weight, p.conv1_bias, 1)
    check_norm("residual_block, second norm", inner, p.norm2_weight, p.norm2_bias, groups[1])
    check_convolution("residual_block, second convolution", inner, p.conv2_weight, p.conv2_bias, 1)
    if p.shortcut_weight is not None:
        check_convolution("residual_block, shortcut", x.shape[1], p.shortcut_weight, p.shortcut_bias, 1)
    _check_kernels(x, p)
    if wants_gradient(x, *parameters):
        tile_bytes = 0
    else:
        tight = True  # for nobody would ask for what else is kept
    y, found, *_ = _call(conv.arranged(x), statistics, *parameters, *groups, *eps, tight, tile_bytes)
    return y, found


def _check_kernels(x: torch.Tensor, p: BlockParameters) -> None:
    for name, weight in {"first": p.conv1_weight, "second": p.conv2_weight}.items():
        if weight.shape[2:] != (3, 3, 3):
            raise ValueError(f"residual_block: the {name} convolution's kernel is 3×3×3, got {tuple(weight.shape)}")
    out = p.conv2_weight.shape[0]
    if p.shortcut_weight is None and x.shape[1] != out:
        raise ValueError(f"residual_block: {x.shape[1]} channels cannot be added to {out} without a shortcut")
    if p.shortcut_weight is not None and p.shortcut_weight.shape != (out, x.shape[1], 1, 1, 1):
        raise ValueError(
            f"residual_block: the shortcut's weight is ({out}, {x.shape[1]}, 1, 1, 1), "
            f"got {tuple(p.shortcut_weight.shape)}"
        )


@self_describing
@torch.library.custom_op("decovae::residual_block", mutates_args=())
def _residual_block(
    x: torch.Tensor,
    statistics: torch.Tensor | None,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    conv1_weight: torch.Tensor,
    conv1_bias: torch.Tensor | None,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    conv2_weight: torch.Tensor,
    conv2_bias: torch.Tensor | None,
    shortcut_weight: torch.Tensor | None,
    shortcut_bias: torch.Tensor | None,
    groups1: int,
    groups2: int,
    eps1: float,
    eps2: float,
    tight: bool,
    tile_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels = kernels_for(x)
    norm1 = Norm(norm1_weight, norm1_bias, groups1, eps1, True)
    norm2 = Norm(norm2_weight, norm2_bias, groups2, eps2, True)
    folds = kernels.FOLDS_BIAS
    shift = conv1_bias if folds else None
    added1, added2, added3 = (None, None, None) if folds else (conv1_bias, conv2_bias, shortcut_bias)
    total = _sum_of(conv2_bias, shortcut_bias) if folds else None
    if conv.fits(x, SAME, tile_bytes):
        a, state1 = kernels.normalize(x, statistics, None, norm1)
        inner = conv.convolve(a, conv1_weight, added1, SAME)
        del a
        a, state2 = kernels.normalize(inner, None, shift, norm2)
        kept = inner if not tight else _none(x)
        del inner
        y = conv.convolve(a, conv2_weight, added2, SAME)
        del a
        side = x if shortcut_weight is None else conv.convolve(x, shortcut_weight, added3, POINTWISE)
        return y, kernels.add(side, y, total, out=y, statistics=True), kept, state1, state2
    # No gradient is wanted: in slabs.
    state1 = kernels.state(x, statistics, None, norm1)
    inner = conv.empty_like_features(x, (x.shape[0], conv1_weight.shape[0], *x.shape[2:]))
    slabs = conv.normalized_slabs(kernels, x, state1, norm1, conv1_weight, added1, SAME, tile_bytes)
    for slab, part in slabs:
        slab.of(inner).copy_(part)
        del part
    state2 = kernels.state(inner, None, shift, norm2)
    y = conv.empty_like_features(x, (x.shape[0], conv2_weight.shape[0], *x.shape[2:]))
    slabs = conv.normalized_slabs(kernels, inner, state2, norm2, conv2_weight, added2, SAME, tile_bytes)
    for slab, part in slabs:
        side = slab.of(x)
        if shortcut_weight is not None:
            side = conv.convolve(side, shortcut_weight, added3, POINTWISE)
        kernels.add(side, part, total, out=slab.of(y), statistics=False)
        del part, side
    return y, kernels.add(None, y, None, out=None, statistics=True), _none(x), state1, state2


@self_describing
@torch.library.custom_op("decovae::residual_block_backward", mutates_args=())
def _residual_block_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    inner: torch.Tensor,
    state1: torch.Tensor,
    state2: torch.Tensor,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    conv1_weight: torch.Tensor,
    conv1_bias: torch.Tensor | None,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    conv2_weight: torch.Tensor,
    conv2_bias: torch.Tensor | None,
    shortcut_weight: torch.Tensor | None,
    shortcut_bias: torch.Tensor | None,
    groups1: int,
    groups2: int,
    eps1: float,
    eps2: float,
    needs_parameters: bool,
) -> list[torch.Tensor]:
    """Gradients of x and of the parameters, in their order; empty where there is no parameter or none is needed."""
    kernels = kernels_for(x)
    norm1 = Norm(norm1_weight, norm1_bias, groups1, eps1, True)
    norm2 = Norm(norm2_weight, norm2_bias, groups2, eps2, True)
    grad = conv.arranged(grad)
    if inner.numel() == 0:
        inner = _inner_again(kernels, x, state1, norm1, conv1_weight, conv1_bias)
    along_a = conv.input_gradient(grad, inner, conv2_weight, SAME)
    carry, a = kernels.begin_gradient(along_a, inner, state2, norm2, activation=needs_parameters)
    along_conv2 = conv.weight_gradient(grad, a, conv2_weight, SAME) if needs_parameters else _none(x)
    del along_a, a
    along_inner, *along_norm2, along_bias1 = kernels.finish_gradient(carry, inner, state2, norm2, other=None, over=True)
    del carry, inner
    along_a = conv.input_gradient(along_inner, x, conv1_weight, SAME)
    carry, a = kernels.begin_gradient(along_a, x, state1, norm1, activation=needs_parameters)
    along_conv1 = conv.weight_gradient(along_inner, a, conv1_weight, SAME) if needs_parameters else _none(x)
    del along_a, a, along_inner
    side, along_shortcut = grad, _none(x)
    if shortcut_weight is not None:
        if needs_parameters:
            along_shortcut = conv.weight_gradient(grad, x, shortcut_weight, POINTWISE)
        side = conv.input_gradient(grad, x, shortcut_weight, POINTWISE)
    along_x, *along_norm1, _ = kernels.finish_gradient(carry, x, state1, norm1, other=side, over=True)
    return [
        along_x,
        *(found.to(like.dtype) for found, like in zip(along_norm1, (norm1_weight, norm1_bias), strict=True)),
        along_conv1,
        _none(x) if conv1_bias is None else along_bias1.to(conv1_bias.dtype),
        *(found.to(like.dtype) for found, like in zip(along_norm2, (norm2_weight, norm2_bias), strict=True)),
        along_conv2,
        conv.bias_gradient(grad, conv2_bias) if needs_parameters and conv2_bias is not None else _none(x),
        along_shortcut,
        conv.bias_gradient(grad, shortcut_bias) if needs_parameters and shortcut_bias is not None else _none(x),
    ]


def _none(x: torch.Tensor) -> torch.Tensor:
    """What an operator returns for nothing: a tensor of its own."""
    return x.new_empty(0)


def _inner_again(
    kernels: Kernels,
    x: torch.Tensor,
    state: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The first convolution's output, as the forward computed it."""
    return conv.convolve(kernels.apply(x, state, norm), weight, None if kernels.FOLDS_BIAS else bias, SAME)


def _sum_of(bias: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if bias is None or other is None:
        return other if bias is None else bias
    return bias.float() + other.float()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, _, *parameters = inputs[:12]
    ctx.options = inputs[12:16]
    ctx.save_for_backward(x, *output[2:], *parameters)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 18
    saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    needed = ctx.needs_input_grad[2:12]
    along_x, *others = _residual_block_backward(grad, *saved, *ctx.options, any(needed))
    along = (found if needs else None for found, needs in zip(others, needed, strict=True))
    return along_x, None, *along, *[None] * 6


_call = differentiable(_residual_block, _save, _backward)


def _block_flops(x: torch.Size, conv1: torch.Size, conv2: torch.Size, shortcut: torch.Size | None) -> tuple[int, int]:
    """Operations of the first convolution, and of the others."""
    spatial = tuple(x[2:])
    inner = torch.Size((x[0], conv1[0], *spatial))
    others = conv.flops(inner, conv2, spatial)
    if shortcut is not None:
        others += conv.flops(x, shortcut, spatial)
    return conv.flops(x, conv1, spatial), others


@register_flop_formula(torch.ops.decovae.residual_block)
def _flops(x: torch.Size, *shapes: Any, **_: Any) -> int:
    return sum(_block_flops(x, shapes[3], shapes[7], shapes[9]))


@register_flop_formula(torch.ops.decovae.residual_block_backward)
def _backward_flops(grad: torch.Size, x: torch.Size, inner: torch.Size, *shapes: Any, **_: Any) -> int:
    first, others = _block_flops(x, shapes[4], shapes[8], shapes[10])
    again = first if inner.numel() == 0 else 0
    return (2 if shapes[-1] else 1) * (first + others) + again

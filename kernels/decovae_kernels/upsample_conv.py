"""Trilinear ×2 upsampling and the 3³ convolution after it, without keeping the upsampled tensor.

decovae::upsample_conv             (x, weight, bias) → y
decovae::upsample_conv_backward    all three gradients, from x and weight

Two ways to the same result. "direct" upsamples, then convolves; backward upsamples again. "factorised" exchanges the
two, Σ_k W_k shift_k(U x) = Σ_k shift_k(U(W_k x)) over the 27 taps k: one matrix product at low resolution with an
eighth of the multiply-adds, then interpolation, shift and sum. Both gradients have the same form.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from decovae_kernels._arguments import checked_input
from decovae_kernels._autograd import differentiable
from decovae_kernels._convolution import is_channels_last
from decovae_kernels._dispatch import full_precision
from decovae_kernels._launch import self_describing
from decovae_kernels._norm import implementation, runs_in_triton
from decovae_kernels.upsample_conv_cost import chosen, direct_flops, factorised_flops

METHODS = ("auto", "direct", "factorised")


def upsample_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    method: str = "auto",
    tile_bytes: int = 0,
) -> torch.Tensor:
    """conv3d(interpolate(x, scale_factor=2, mode="trilinear"), weight, bias, padding=1); differentiable once.

    Args:
        x: (N, C_in, D, H, W), float16, bfloat16, float32 or float64, any strides; under autocast it is cast first.
        weight: (C_out, C_in, 3, 3, 3), any of these dtypes: cast to that of `x`, and its gradient back.
        bias: (C_out,) or None.
        method: "direct", "factorised", or "auto" for the one of less predicted time, by shapes, dtype and kind of
            device alone.
        tile_bytes: about how large a temporary may be: the factorised way's products, and in the direct way's forward
            the upsampled tensor. 0 leaves it to the factorised way, and the direct way upsamples everything at once.

    Returns:
        (N, C_out, 2D, 2H, 2W) in the dtype of `x`, computed in float32 (float64 for float64) but for the operands of
        the matrix products. Channels-last in memory on Triton and for channels-last `x`, else contiguous.

    Raises:
        TypeError: `x`, `weight` or `bias` is not floating point.
        ValueError: a shape does not fit, `method` is unknown, or `tile_bytes` is negative.
    """
    if method not in METHODS:
        raise ValueError(f"upsample_conv: method must be one of {', '.join(METHODS)}, got {method!r}")
    if tile_bytes < 0:
        raise ValueError(f"upsample_conv: tile_bytes must not be negative, got {tile_bytes}")
    x = checked_input(x, "upsample_conv", may_be_empty=True)
    for parameter in (weight, bias):
        if parameter is not None and not parameter.is_floating_point():
            raise TypeError(f"upsample_conv takes floating-point parameters, got {parameter.dtype}")
    if weight.ndim != 5 or weight.shape[1:] != (x.shape[1], 3, 3, 3):
        raise ValueError(
            f"upsample_conv: {x.shape[1]} channels need a weight of shape (out, {x.shape[1]}, 3, 3, 3), "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"upsample_conv: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    y: torch.Tensor = _call(x, weight, bias, method, tile_bytes)
    return y


@torch.library.custom_op("decovae::upsample_conv", mutates_args=())
def _upsample_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, method: str, tile_bytes: int
) -> torch.Tensor:
    kernels = implementation("upsample_conv", x)
    with full_precision(x):
        if 0 in x.shape or weight.shape[0] == 0:
            y = x.new_empty(_output_shape(x, weight))
            if y.numel():
                y.zero_() if bias is None else y.copy_(bias.view(-1, 1, 1, 1).expand_as(y))
        elif _way(x, weight, method) == "direct":
            y = _direct(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), kernels, tile_bytes)
        else:
            y = kernels.forward(x, weight.to(x.dtype), bias, _slab_bytes(kernels, x, tile_bytes))
    return _laid_out(y, _channels_last(x))


@torch.library.custom_op("decovae::upsample_conv_backward", mutates_args=())
def _upsample_conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    method: str,
    tile_bytes: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in the dtypes of `x` and `weight`, that of the bias in float32 at least; empty where not needed."""
    kernels = implementation("upsample_conv", x)
    grad_x: torch.Tensor | None = None
    grad_weight: torch.Tensor | None = None
    with full_precision(x):
        if grad.numel() == 0 or x.numel() == 0:
            grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        elif needs_x or needs_weight:
            cast, needs = weight.to(x.dtype), (needs_x, needs_weight)
            if _way(x, weight, method) == "direct":
                grad_x, grad_weight = _direct_backward(grad, x, cast, kernels, needs)
            else:
                grad_x, grad_weight = kernels.backward(grad, x, cast, _slab_bytes(kernels, x, tile_bytes), needs)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(0) if grad_x is None or not needs_x else _laid_out(grad_x, _channels_last(x)),
        weight.new_empty(0) if grad_weight is None or not needs_weight else _plain(grad_weight.to(weight.dtype)),
        grad.sum((0, 2, 3, 4), dtype=wide) if needs_bias else grad.new_empty(0, dtype=wide),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, ctx.method, ctx.tile_bytes = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = _upsample_conv_backward(grad, x, weight, ctx.method, ctx.tile_bytes, *needs)
    grads = [gradient if needed else None for gradient, needed in zip(found, needs, strict=True)]
    if grads[2] is not None:
        grads[2] = grads[2].to(ctx.bias_dtype)
    return *grads, None, None


self_describing(_upsample_conv)
self_describing(_upsample_conv_backward)
_call = differentiable(_upsample_conv, _save, _backward)


@register_flop_formula(torch.ops.decovae.upsample_conv, get_raw=True)
def _forward_flops(x: torch.Tensor, weight: torch.Tensor, bias: Any, method: str, *_: Any, **__: Any) -> int:
    count = direct_flops if _way(x, weight, method) == "direct" else factorised_flops
    return count(x.shape[1], weight.shape[0], x.numel() // max(x.shape[1], 1))


@register_flop_formula(torch.ops.decovae.upsample_conv_backward, get_raw=True)
def _backward_flops(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    method: str,
    tile_bytes: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    **_: Any,
) -> int:
    return (needs_x + needs_weight) * _forward_flops(x, weight, None, method)


def _slab_bytes(kernels: ModuleType, x: torch.Tensor, tile_bytes: int) -> int:
    """What the factorised way's products may take at a time."""
    most: int = kernels.slab_bytes(x)
    return min(tile_bytes, most) if tile_bytes else most


def _way(x: torch.Tensor, weight: torch.Tensor, method: str) -> str:
    return chosen(x, weight.shape[0], runs_in_triton(x)) if method == "auto" else method


def _output_shape(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, ...]:
    return x.shape[0], weight.shape[0], *(2 * size for size in x.shape[2:])


def _channels_last(x: torch.Tensor) -> bool:
    """Whether what is computed from `x` is laid out so."""
    return is_channels_last(x) or runs_in_triton(x)


def _laid_out(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`x` with the strides of a fresh tensor of that layout, also along axes of one element, where any would do."""
    return _plain(x.movedim(1, -1)).movedim(-1, 1) if channels_last else _plain(x)


def _plain(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x.as_strided(x.shape, torch._prims_common.make_contiguous_strides_for(x.shape))


def _direct(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kernels: ModuleType, tile_bytes: int
) -> torch.Tensor:
    volumes, channels, depth, height, width = x.shape
    plane = 4 * channels * height * width * x.element_size()
    # A slab of k low-resolution planes needs U of a plane on either side too.
    step = depth if tile_bytes == 0 else max(tile_bytes // (2 * plane) - 2, 1)
    if step >= depth and (tile_bytes == 0 or volumes == 1):
        return torch.nn.functional.conv3d(kernels.upsample(x), weight, bias, padding=1)
    layout = torch.channels_last_3d if _channels_last(x) else torch.contiguous_format
    y = torch.empty(_output_shape(x, weight), dtype=x.dtype, device=x.device, memory_format=layout)
    for n in range(volumes):
        for start in range(0, depth, step):
            end = min(start + step, depth)
            first, last = max(start - 1, 0), min(end + 1, depth)
            # The convolution sees one plane of high resolution beyond the slab, zero beyond the volume.
            above, below = 2 * start - 1, 2 * end + 1
            upsampled = kernels.upsample(x[n : n + 1, :, first:last])
            upsampled = upsampled[:, :, max(above, 0) - 2 * first : min(below, 2 * depth) - 2 * first]
            upsampled = torch.nn.functional.pad(upsampled, (0, 0, 0, 0, int(above < 0), int(below > 2 * depth)))
            y[n : n + 1, :, 2 * start : 2 * end] = torch.nn.functional.conv3d(
                upsampled, weight, bias, padding=(0, 1, 1)
            )
    return y


def _direct_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, kernels: ModuleType, needs: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    # Of the upsampled tensor the gradient of the input needs the shape alone.
    upsampled = kernels.upsample(x)
    ones, zeros = [1, 1, 1], [0, 0, 0]
    grad_upsampled, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, upsampled, weight, None, ones, ones, ones, False, zeros, 1, [*needs, False]
    )
    del upsampled
    return None if grad_upsampled is None else kernels.downsample(grad_upsampled), grad_weight

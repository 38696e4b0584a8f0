"""Convolutions as the fused blocks use them: torch's own, in the layout and dtype of their input, whole or in slabs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.flop_counter import conv_flop_count

from decovae_kernels._dispatch import full_precision
from decovae_kernels._norm import Kernels, Norm


class Geometry(NamedTuple):
    """How a convolution of three spatial axes walks; padding is with zeros, on both sides of an axis."""

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (1, 1, 1)
    dilation: tuple[int, ...] = (1, 1, 1)
    groups: int = 1


SAME = Geometry()
POINTWISE = Geometry(padding=(0, 0, 0))


def arranged(x: torch.Tensor) -> torch.Tensor:
    """`x` in the layout that convolutions are fastest in, on GPUs and on CPUs."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a voxel lie side by side, and not also in planes of their own."""
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry) -> torch.Tensor:
    """The convolution in the dtype of `x`, channels-last."""
    with full_precision(x):
        bias = None if bias is None else bias.to(x.dtype)
        y = torch.ops.aten.convolution(x, _like_input(weight, x), bias, *_arguments(geometry))
    return arranged(y)


def input_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The gradient of a convolution with respect to its input, whose shape alone is taken from `x`."""
    return arranged(_gradients(grad, x, weight, geometry, [True, False, False])[0])


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The gradient of a convolution with respect to its weight, in the dtype of `weight`."""
    return _gradients(grad, x, weight, geometry, [False, True, False])[1].to(weight.dtype)


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[torch.Tensor, ...]:
    with full_precision(x):
        found: tuple[torch.Tensor, ...] = torch.ops.aten.convolution_backward(
            grad, x, _like_input(weight, x), None, *_arguments(geometry), wanted
        )
    return found


def bias_gradient(grad: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The gradient of a convolution with respect to its bias, summed in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.sum(dim=(0, 2, 3, 4), dtype=wide).to(bias.dtype)


def _arguments(geometry: Geometry) -> tuple[object, ...]:
    stride, padding, dilation, groups = geometry
    return list(stride), list(padding), list(dilation), False, [0, 0, 0], groups


def _like_input(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight in the dtype of `x`, and channels-last, to which a convolution would convert it on every call."""
    # By permutation: with one input channel the strides would else stay ambiguous, and torch would fall back to planes.
    return weight.to(x.dtype).permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def fits(x: torch.Tensor, geometry: Geometry, tile_bytes: int) -> bool:
    """Whether a temporary as large as `x` may be whole; a convolution with strides or dilation is never cut."""
    whole = geometry.stride != (1, 1, 1) or geometry.dilation != (1, 1, 1)
    return whole or tile_bytes <= 0 or x.numel() * x.element_size() <= tile_bytes


class Slab(NamedTuple):
    """Output planes [start, end) of one volume."""

    volume: int
    start: int
    end: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """These planes of `x`, (1, C, end − start, H, W)."""
        return x[self.volume : self.volume + 1, :, self.start : self.end]


def normalized_slabs(
    kernels: Kernels,
    x: torch.Tensor,
    state: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    tile_bytes: int,
) -> Iterator[tuple[Slab, torch.Tensor]]:
    """conv(act(γ x̂ + β)), a slab of planes after the other, whose activations take about `tile_bytes` at a time.

    The norm's statistics are those of the whole volume and the slabs overlap by the kernel's reach, so there are no
    seams: together the slabs are the untiled result. Whoever iterates drops a slab before asking for the next.
    """
    volumes, channels, depth, height, width = x.shape
    reach, padding = weight.shape[2] - 1, geometry.padding[0]
    plane = channels * height * width * x.element_size()
    planes = max(tile_bytes // max(plane, 1) - reach, 1)
    inner = geometry._replace(padding=(0, *geometry.padding[1:]))
    for volume in range(volumes):
        for start in range(0, depth + 2 * padding - reach, planes):
            end = min(start + planes, depth + 2 * padding - reach)
            first, last = start - padding, end - padding + reach
            tile = empty_like_features(x, (1, channels, last - first, height, width))
            inside = Slab(volume, max(first, 0), min(last, depth))
            tile[:, :, : inside.start - first].zero_()
            tile[:, :, inside.end - first :].zero_()
            target = tile[:, :, inside.start - first : inside.end - first]
            kernels.apply(inside.of(x), state[volume : volume + 1], norm, out=target)
            part = convolve(tile, weight, bias, inner)
            del tile, target  # before the next of each: two at once would double what slabs are there to bound
            yield Slab(volume, start, end), part
            del part


def empty_like_features(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An empty channels-last tensor in the dtype and on the device of `x`."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def output_size(spatial: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """Spatial size of a convolution's output."""
    axes = zip(spatial, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return tuple((size + 2 * pad - dilation * (taps - 1) - 1) // step + 1 for size, taps, step, pad, dilation in axes)


def flops(x: torch.Size, weight: torch.Size, spatial: tuple[int, ...]) -> int:
    """Operations, two a multiply-add, of a convolution of `x` to an output of that spatial size."""
    return conv_flop_count(list(x), list(weight), [x[0], weight[0], *spatial])

"""Inputs and calls of the upsampling convolution: around its products, around its convolution, and whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.tune.work import Maker, Prepared, Recipe, Tensors, Work, same
from decovae_kernels import reference


def _gathered(products: Tensor, bias: Tensor) -> Tensor:
    """Σ_k shift_k(U m_k) + bias, (N, C, 2D, 2H, 2W), of products (N, 27, C, D, H, W)."""
    volumes, taps, channels, *spatial = products.shape
    doubled = [2 * size for size in spatial]
    upsampled = torch.nn.functional.interpolate(products.flatten(0, 1), scale_factor=2, mode="trilinear")
    padded = torch.nn.functional.pad(upsampled, (1,) * 6).view(volumes, taps, channels, *(n + 2 for n in doubled))
    total = bias.view(-1, 1, 1, 1)
    for k in range(taps):
        d, h, w = k // 9, k // 3 % 3, k % 3
        total = total + padded[:, k, :, d : d + doubled[0], h : h + doubled[1], w : w + doubled[2]]
    return total


def _gather(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    volumes, channels, *spatial = work.sizes
    products = make.numbers(math.prod((volumes, *spatial)), 27 * channels, dtype=work.dtype)
    bias = make.numbers(channels)

    def run() -> Tensors:
        out = products.new_empty(volumes, *(2 * size for size in spatial), channels)
        upsample_conv_triton.gather(products, bias, out, 0, spatial[0], spatial[0])
        return (out,)

    def expected() -> Tensors:
        apart = products.double().view(volumes, *spatial, 27, channels).permute(0, 4, 5, 1, 2, 3)
        return (_gathered(apart, bias.double()).movedim(1, -1).to(work.dtype),)

    return Prepared(run, same, expected, products.nbytes * 35 // 27)


def _spread(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    volumes, channels, *spatial = work.sizes
    grad = make.numbers(volumes, *(2 * size for size in spatial), channels, dtype=work.dtype)

    def run() -> Tensors:
        pulled = grad.new_empty(math.prod((volumes, *spatial)), 27 * channels)
        upsample_conv_triton.spread(grad, pulled, 0, spatial[0])
        return (pulled,)

    def expected() -> Tensors:
        products = grad.new_zeros(volumes, 27, channels, *spatial, dtype=torch.float64).requires_grad_()
        gathered = _gathered(products, grad.new_zeros(channels, dtype=torch.float64))
        (pulled,) = torch.autograd.grad(gathered, products, grad.double().movedim(-1, 1))
        return (pulled.permute(0, 3, 4, 5, 1, 2).reshape(-1, 27 * channels).to(work.dtype),)

    return Prepared(run, same, expected, grad.nbytes * 35 // 8)


def _upsample(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    x = make.tensor()

    def expected() -> Tensors:
        return (torch.nn.functional.interpolate(x.double(), scale_factor=2, mode="trilinear").to(x.dtype),)

    return Prepared(lambda: (upsample_conv_triton.upsample(x),), same, expected, 9 * x.nbytes)


def _downsample(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton

    grad = make.tensor(scale=2)

    def expected() -> Tensors:
        low = grad.new_zeros(work.sizes, dtype=torch.float64).requires_grad_()
        high = torch.nn.functional.interpolate(low, scale_factor=2, mode="trilinear")
        return (torch.autograd.grad(high, low, grad.double())[0].to(grad.dtype),)

    return Prepared(lambda: (upsample_conv_triton.downsample(grad),), same, expected, grad.nbytes * 9 // 8)


def _slab(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import upsample_conv_triton as kernels

    x, grad, channels = make.tensor(), make.tensor(scale=2), work.sizes[1]
    weight = (make.numbers(channels, channels, 3, 3, 3) / math.sqrt(27 * channels)).to(work.dtype)

    def run() -> Tensors:
        slab = kernels.slab_bytes(x)
        along_x, along_weight = kernels.backward(grad, x, weight, slab, (True, True))
        assert along_x is not None  # both were asked for
        assert along_weight is not None
        return kernels.forward(x, weight, None, slab), along_x, along_weight

    def expected() -> Tensors:
        leaves = [value.double().requires_grad_() for value in (x, weight)]
        y = reference.upsample_conv(leaves[0], leaves[1])
        along_x, along_weight = torch.autograd.grad(y, leaves, grad.double())
        return y.detach().to(x.dtype), along_x.to(x.dtype), along_weight.float()

    # Products written and read forward; their gradients written once and read twice.
    return Prepared(run, same, expected, 5 * 27 * x.nbytes)


RECIPES: Mapping[str, Recipe] = {
    "gather": _gather,
    "spread": _spread,
    "upsample": _upsample,
    "downsample": _downsample,
    "slab": _slab,
}

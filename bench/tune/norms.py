"""Inputs and calls of the group norm's passes, and of the merging between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.tune.work import GROUPS, Maker, Prepared, Recipe, Tensors, Work, same
from decovae_kernels._norm import Norm

_EPSILON = 1e-6


def _norm(make: Maker, channels: int) -> Norm:
    # Of groups of one channel, the sum of the gradient is zero, and two ways to round it have nothing to agree on.
    return Norm(make.numbers(channels), make.numbers(channels), min(GROUPS, channels // 2), _EPSILON, True)


def _merged(statistics: Tensor) -> Tensors:
    """Mean and standard deviation (N, C) of statistics of chunks (N, P, 3, C)."""
    count, mean, scatter = statistics.double().unbind(2)
    total = count.sum(1)
    centre = (count * mean).sum(1) / total
    spread = (scatter + count * (mean - centre[:, None]).square()).sum(1)
    return centre, (spread / total).sqrt()


def _norm_add(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    left, right, bias = make.tensor(), make.tensor(), make.numbers(work.sizes[1])

    def run() -> Tensors:
        out = torch.empty_like(left)
        return out, group_norm_triton.add(left, right, bias, out=out, statistics=True)

    def expected() -> Tensors:
        out = (left.float() + right.float() + bias.view(-1, 1, 1, 1)).to(left.dtype)
        wide = out.double().flatten(2)
        return out, wide.mean(2), wide.std(2, correction=0)

    return Prepared(run, lambda found: (found[0], *_merged(found[1])), expected, 3 * left.nbytes)


def _state_of(x: Tensor, norm: Norm) -> Tensor:
    """State (N, 3, C) of the norm of `x`."""
    volumes, channels = x.shape[:2]
    grouped = x.double().reshape(volumes, norm.groups, -1)
    mean = grouped.mean(2)
    rstd = (grouped.var(2, correction=0) + norm.eps).rsqrt()
    each = channels // norm.groups
    centre, rstd = (value.repeat_interleave(each, 1) for value in (mean, rstd))
    return torch.stack([centre, rstd, (x.double().flatten(2).mean(2) - centre) * rstd], 1).float()


def _norm_state(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    x, norm = make.tensor(), _norm(make, work.sizes[1])
    statistics = group_norm_triton.add(None, x, None, out=None, statistics=True)
    return Prepared(
        lambda: (group_norm_triton.state(x, statistics, None, norm),), same, lambda: (_state_of(x, norm),),
        statistics.nbytes,
    )  # fmt: skip


def _normalised(x: Tensor, state: Tensor, norm: Norm) -> Tensor:
    """x̂, in float64."""
    return (x.double() - _voxelwise(state[:, 0])) * _voxelwise(state[:, 1])


def _voxelwise(numbers: Tensor) -> Tensor:
    return numbers.double().view(*numbers.shape, 1, 1, 1)


def _norm_apply(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    x, norm = make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)

    def expected() -> Tensors:
        z = _normalised(x, state, norm) * _voxelwise(norm.weight) + _voxelwise(norm.bias)
        return (torch.nn.functional.silu(z).to(x.dtype),)

    return Prepared(lambda: (group_norm_triton.apply(x, state, norm),), same, expected, 2 * x.nbytes)


def _activated(grad: Tensor, x: Tensor, state: Tensor, norm: Norm) -> Tensors:
    """x̂, the activation and the gradient behind it, dz, in float64."""
    normal = _normalised(x, state, norm)
    z = normal * _voxelwise(norm.weight) + _voxelwise(norm.bias)
    gate = z.sigmoid()
    return normal, z * gate, grad.double() * gate * (1 + z * (1 - gate))


def _norm_sums(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    grad, x, norm = make.tensor(), make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)

    def run() -> Tensors:
        (_, partial), again = group_norm_triton.begin_gradient(grad, x, state, norm, activation=True)
        return partial, again

    def expected() -> Tensors:
        normal, activation, dz = _activated(grad, x, state, norm)
        sums = torch.stack([dz.sum((2, 3, 4)), (dz * normal).sum((2, 3, 4))], 1)
        return sums, activation.to(x.dtype)

    return Prepared(run, lambda found: (found[0].double().sum(1), found[1]), expected, 3 * x.nbytes)


def _gradient_means(grad: Tensor, x: Tensor, state: Tensor, norm: Norm) -> Tensor:
    """The groups' means (N, 2, C) of γ dz and γ dz·x̂, in float64."""
    normal, _, dz = _activated(grad, x, state, norm)
    scaled = dz * _voxelwise(norm.weight)
    means = [part.reshape(len(x), norm.groups, -1).mean(2) for part in (scaled, scaled * normal)]
    return torch.stack(means, 1).repeat_interleave(x.shape[1] // norm.groups, 2)


def _gradient(grad: Tensor, x: Tensor, state: Tensor, norm: Norm) -> Tensors:
    """The gradient of x in float64, and float32 those of γ, β and a bias folded into x."""
    normal, _, dz = _activated(grad, x, state, norm)
    mean, slope = (_voxelwise(part) for part in _gradient_means(grad, x, state, norm).unbind(1))
    along = _voxelwise(state[:, 1]) * (dz * _voxelwise(norm.weight) - mean - normal * slope)
    return along, *(part.sum((0, 2, 3, 4)).float() for part in (dz * normal, dz, along))


def _norm_coefficients(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    grad, x, norm = make.tensor(), make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)
    (_, partial), _ = group_norm_triton.begin_gradient(grad, x, state, norm, activation=False)

    def expected() -> Tensors:
        return _gradient_means(grad, x, state, norm).float(), *_gradient(grad, x, state, norm)[1:]

    return Prepared(lambda: group_norm_triton.coefficients(partial, x, state, norm), same, expected, partial.nbytes)


def _norm_gradient(work: Work, make: Maker) -> Prepared:
    from decovae_kernels import group_norm_triton

    grad, x, other, norm = make.tensor(), make.tensor(), make.tensor(), _norm(make, work.sizes[1])
    state = _state_of(x, norm)
    carry, _ = group_norm_triton.begin_gradient(grad, x, state, norm, activation=False)

    def run() -> Tensors:
        return group_norm_triton.finish_gradient(carry, x, state, norm, other=other, over=False)

    def expected() -> Tensors:
        along, *sums = _gradient(grad, x, state, norm)
        return ((along + other.double()).to(x.dtype), *sums)

    return Prepared(run, same, expected, 4 * x.nbytes)


RECIPES: Mapping[str, Recipe] = {
    "norm_add": _norm_add,
    "norm_state": _norm_state,
    "norm_apply": _norm_apply,
    "norm_sums": _norm_sums,
    "norm_coefficients": _norm_coefficients,
    "norm_gradient": _norm_gradient,
}

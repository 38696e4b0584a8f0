"""Group norm and SiLU in Triton, in passes over tiles of samples × channels of a channels-last or contiguous tensor.

Statistics travel per channel and chunk of samples as (count, mean, M2), so a pass that writes a tensor can leave them
for a norm whose groups it need not know. What a norm keeps for its backward is its `state`, three numbers a volume and
channel: `centre` and `rstd` with x̂ = (x − centre)·rstd, and the channel's mean of x̂.
"""

# mypy: disable-error-code="no-untyped-def"
# (a Triton kernel's arguments are pointers and scalars, which have no Python types)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from decovae_kernels._launch import launch
from decovae_kernels._norm import Carry, Norm
from decovae_kernels.configurations import (
    NORM_ADD,
    NORM_APPLY,
    NORM_COEFFICIENTS,
    NORM_GRADIENT,
    NORM_STATE,
    NORM_SUMS,
    Kernel,
    Merging,
    Passing,
)
from decovae_kernels.tiles import divided, multiprocessors, power_of_two

# What a grid has along its third axis.
_MOST_VOLUMES = 65535

FOLDS_BIAS = True


@triton.jit
def _tile(C, stride_n, stride_c, stride_s, chunk, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's channels, the offset of its first sample, and offsets (BLOCK_S, BLOCK_C) within a tile."""
    first_channel = tl.program_id(1) * BLOCK_C
    base = (
        tl.program_id(2).to(tl.int64) * stride_n
        + first_channel.to(tl.int64) * stride_c
        + (tl.program_id(0).to(tl.int64) * chunk) * stride_s
    )
    offsets = tl.arange(0, BLOCK_S)[:, None] * stride_s + tl.arange(0, BLOCK_C)[None, :] * stride_c
    return first_channel + tl.arange(0, BLOCK_C), base, offsets


@triton.jit
def _valid(i, length, channel, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which elements (BLOCK_S, BLOCK_C) of the i-th tile exist."""
    return ((i * BLOCK_S + tl.arange(0, BLOCK_S)) < length)[:, None] & (channel < C)[None, :]


@triton.jit
def _read(ptr, valid, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr, mask=valid, other=0.0).to(tl.float32)
    return tl.load(ptr).to(tl.float32)


@triton.jit
def _write(ptr, value, valid, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr, value, mask=valid)
    else:
        tl.store(ptr, value)


@triton.jit
def _norm_of(state, weight, bias, channel, C):
    """Centre, rstd, γ and β of this program's channels, (1, BLOCK_C) each."""
    inside = channel < C
    row = state + tl.program_id(2).to(tl.int64) * 3 * C + channel
    centre = tl.load(row, mask=inside, other=0.0)
    rstd = tl.load(row + C, mask=inside, other=0.0)
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return centre[None, :], rstd[None, :], gamma[None, :], beta[None, :]


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(−z)) to 3e-7, in half the instructions of `tl.sigmoid`: neither step guards against denormals."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return root * root


@triton.jit
def _add_kernel(
    left, right, bias, out, partial, C, S, chunk, stride_n, stride_c, stride_s,
    HAS_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = left + right + bias, and (count, mean, M2) a channel of this program's chunk of `out` as it was rounded."""
    channel, base, offsets = _tile(C, stride_n, stride_c, stride_s, chunk, BLOCK_S, BLOCK_C)
    length = tl.minimum(chunk, S - tl.program_id(0) * chunk)
    tiles = tl.cdiv(length, BLOCK_S)
    mean = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    scatter = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    for i in range(tiles):
        valid = _valid(i, length, channel, C, BLOCK_S, BLOCK_C)
        value = _read(right + base + offsets, valid, MASKED)
        if HAS_LEFT:
            value += _read(left + base + offsets, valid, MASKED)
        if HAS_BIAS:
            value += shift
        if HAS_OUT:
            rounded = value.to(out.dtype.element_ty)
            _write(out + base + offsets, rounded, valid, MASKED)
            value = rounded.to(tl.float32)
        if HAS_PARTIAL:
            # Welford, each lane for itself.
            delta = value - mean
            if MASKED:
                delta = tl.where(valid, delta, 0.0)
            mean += delta * (1.0 / (i + 1))
            scatter += delta * (value - mean)
        base += BLOCK_S * stride_s
    if HAS_PARTIAL:
        # Lanes past the end of the last tile have seen one sample less.
        seen = (tiles - (tl.arange(0, BLOCK_S) >= length - (tiles - 1) * BLOCK_S).to(tl.int32)).to(tl.float32)[:, None]
        count = length.to(tl.float32)
        centre = tl.sum(mean * seen, axis=0) / count
        away = mean - centre[None, :]
        total = tl.sum(scatter + seen * away * away, axis=0)
        row = partial + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 3 * C + channel
        tl.store(row, tl.zeros((BLOCK_C,), tl.float32) + count, mask=channel < C)
        tl.store(row + C, centre, mask=channel < C)
        tl.store(row + 2 * C, total, mask=channel < C)


@triton.jit
def _norm_state_kernel(
    partial, bias, state, C, P, eps,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one volume and group (Chan) into its state; GROUP channels, BLOCK_G a power of two."""
    group, n = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, BLOCK_G)
    inside = member < GROUP
    channel = group * GROUP + member
    source = partial + n.to(tl.int64) * P * 3 * C + channel
    shift = tl.zeros((BLOCK_G,), tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    # Means are taken relative to one of them: their differences are small where they themselves are not.
    origin = tl.load(source + C, mask=inside, other=0.0)
    count = tl.zeros((BLOCK_G,), tl.float32)
    above = tl.zeros((BLOCK_G,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        valid = (p < P)[:, None] & inside[None, :]
        rows = source[None, :] + p[:, None] * (3 * C)
        here = tl.load(rows, mask=valid, other=0.0)
        count += tl.sum(here, axis=0)
        above += tl.sum(here * (tl.load(rows + C, mask=valid, other=0.0) - origin[None, :]), axis=0)
    mean = origin + shift + above / tl.where(inside, count, 1.0)
    first_mean = tl.sum(tl.where(member == 0, mean, 0.0))
    total = tl.sum(count)
    centre = first_mean + tl.sum(tl.where(inside, count * (mean - first_mean), 0.0)) / total
    scatter = tl.zeros((BLOCK_G,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        valid = (p < P)[:, None] & inside[None, :]
        rows = source[None, :] + p[:, None] * (3 * C)
        away = tl.load(rows + C, mask=valid, other=0.0) + shift[None, :] - centre
        spread = tl.load(rows, mask=valid, other=0.0) * away * away + tl.load(rows + 2 * C, mask=valid, other=0.0)
        scatter += tl.sum(tl.where(valid, spread, 0.0), axis=0)
    rstd = 1.0 / tl.sqrt(tl.sum(scatter) / total + eps)
    target = state + n.to(tl.int64) * 3 * C + channel
    tl.store(target, centre - shift, mask=inside)
    tl.store(target + C, tl.zeros((BLOCK_G,), tl.float32) + rstd, mask=inside)
    tl.store(target + 2 * C, (mean - centre) * rstd, mask=inside)


@triton.jit
def _norm_apply_kernel(
    x, state, weight, bias, out, C, S, chunk, stride_n, stride_c, stride_s,
    SILU: tl.constexpr, MASKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = act(γ x̂ + β)."""
    channel, base, offsets = _tile(C, stride_n, stride_c, stride_s, chunk, BLOCK_S, BLOCK_C)
    length = tl.minimum(chunk, S - tl.program_id(0) * chunk)
    centre, rstd, gamma, beta = _norm_of(state, weight, bias, channel, C)
    scale = rstd * gamma
    for i in range(tl.cdiv(length, BLOCK_S)):
        valid = _valid(i, length, channel, C, BLOCK_S, BLOCK_C)
        value = (_read(x + base + offsets, valid, MASKED) - centre) * scale + beta
        if SILU:
            value = value * _sigmoid(value)
        _write(out + base + offsets, value.to(out.dtype.element_ty), valid, MASKED)
        base += BLOCK_S * stride_s


@triton.jit
def _through_activation(grad, normal, weight, bias, SILU: tl.constexpr):
    """The activation of z = γ x̂ + β, and the gradient with respect to z."""
    z = normal * weight + bias
    if SILU:
        gate = _sigmoid(z)
        return z * gate, grad * gate * (1.0 + z * (1.0 - gate))
    return z, grad


@triton.jit
def _norm_sums_kernel(
    grad, x, state, weight, bias, activation, partial, C, S, chunk, stride_n, stride_c, stride_s,
    SILU: tl.constexpr, HAS_ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz·x̂ a channel over this program's chunk; the activation that the forward did not keep."""
    channel, base, offsets = _tile(C, stride_n, stride_c, stride_s, chunk, BLOCK_S, BLOCK_C)
    length = tl.minimum(chunk, S - tl.program_id(0) * chunk)
    centre, rstd, gamma, beta = _norm_of(state, weight, bias, channel, C)
    along_beta = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    along_gamma = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for i in range(tl.cdiv(length, BLOCK_S)):
        valid = _valid(i, length, channel, C, BLOCK_S, BLOCK_C)
        normal = (_read(x + base + offsets, valid, MASKED) - centre) * rstd
        # Elements that do not exist read a gradient of zero, and so add nothing.
        value, dz = _through_activation(_read(grad + base + offsets, valid, MASKED), normal, gamma, beta, SILU)
        along_beta += dz
        along_gamma += dz * normal
        if HAS_ACTIVATION:
            _write(activation + base + offsets, value.to(activation.dtype.element_ty), valid, MASKED)
        base += BLOCK_S * stride_s
    target = partial + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2 * C + channel
    tl.store(target, tl.sum(along_beta, axis=0), mask=channel < C)
    tl.store(target + C, tl.sum(along_gamma, axis=0), mask=channel < C)


@triton.jit
def _norm_coefficients_kernel(
    partial, state, weight, means, along_weight, along_bias, along_shift, N, C, P, samples,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Of one group: the group's means of γ dz and γ dz·x̂ a volume, and the gradients of γ, β and the folded bias.

    `samples` is a float: as an integer, a volume of one sample would be a constant.
    """
    member = tl.arange(0, BLOCK_G)
    inside = member < GROUP
    channel = tl.program_id(0) * GROUP + member
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_G,), tl.float32)
    sum_bias = tl.zeros((BLOCK_G,), tl.float32)
    sum_shift = tl.zeros((BLOCK_G,), tl.float32)
    for n in range(N):
        source = partial + tl.cast(n, tl.int64) * P * 2 * C + channel
        dz = tl.zeros((BLOCK_G,), tl.float32)
        dz_normal = tl.zeros((BLOCK_G,), tl.float32)
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            valid = (p < P)[:, None] & inside[None, :]
            rows = source[None, :] + p[:, None] * (2 * C)
            dz += tl.sum(tl.load(rows, mask=valid, other=0.0), axis=0)
            dz_normal += tl.sum(tl.load(rows + C, mask=valid, other=0.0), axis=0)
        mean = tl.sum(gamma * dz) / (samples * GROUP)
        slope = tl.sum(gamma * dz_normal) / (samples * GROUP)
        target = means + tl.cast(n, tl.int64) * 2 * C + channel
        tl.store(target, tl.zeros((BLOCK_G,), tl.float32) + mean, mask=inside)
        tl.store(target + C, tl.zeros((BLOCK_G,), tl.float32) + slope, mask=inside)
        row = state + tl.cast(n, tl.int64) * 3 * C + channel
        rstd = tl.load(row + C, mask=inside, other=0.0)
        normal_mean = tl.load(row + 2 * C, mask=inside, other=0.0)
        sum_bias += dz
        sum_weight += dz_normal
        # Σ over samples of the input's gradient, without reading a sample.
        sum_shift += rstd * (gamma * dz - samples * (mean + slope * normal_mean))
    tl.store(along_weight + channel, sum_weight, mask=inside)
    tl.store(along_bias + channel, sum_bias, mask=inside)
    tl.store(along_shift + channel, sum_shift, mask=inside)


@triton.jit
def _norm_gradient_kernel(
    grad, x, state, weight, bias, means, other, out, C, S, chunk, stride_n, stride_c, stride_s,
    SILU: tl.constexpr, HAS_OTHER: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = rstd (γ dz − mean(γ dz) − x̂ mean(γ dz·x̂)) + other, means over the group."""
    channel, base, offsets = _tile(C, stride_n, stride_c, stride_s, chunk, BLOCK_S, BLOCK_C)
    length = tl.minimum(chunk, S - tl.program_id(0) * chunk)
    centre, rstd, gamma, beta = _norm_of(state, weight, bias, channel, C)
    row = means + tl.program_id(2).to(tl.int64) * 2 * C + channel
    mean = tl.load(row, mask=channel < C, other=0.0)[None, :]
    slope = tl.load(row + C, mask=channel < C, other=0.0)[None, :]
    for i in range(tl.cdiv(length, BLOCK_S)):
        valid = _valid(i, length, channel, C, BLOCK_S, BLOCK_C)
        normal = (_read(x + base + offsets, valid, MASKED) - centre) * rstd
        _, dz = _through_activation(_read(grad + base + offsets, valid, MASKED), normal, gamma, beta, SILU)
        value = rstd * (gamma * dz - mean - normal * slope)
        if HAS_OTHER:
            value += _read(other + base + offsets, valid, MASKED)
        _write(out + base + offsets, value.to(out.dtype.element_ty), valid, MASKED)
        base += BLOCK_S * stride_s


class _Plan(NamedTuple):
    """How a tensor is walked: its strides, and which samples and channels a program takes."""

    volumes: int
    channels: int
    samples: int
    strides: tuple[int, int, int]
    programs: int
    chunk: int
    block_s: int
    block_c: int
    warps: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.programs, divided(self.channels, self.block_c), self.volumes

    @property
    def options(self) -> dict[str, int | bool]:
        masked = self.samples % self.block_s != 0 or self.channels % self.block_c != 0
        return {"MASKED": masked, "BLOCK_S": self.block_s, "BLOCK_C": self.block_c, "num_warps": self.warps}

    @property
    def arguments(self) -> tuple[int, ...]:
        return self.channels, self.samples, self.chunk, *self.strides


def _plan(kernel: Kernel[Passing], x: torch.Tensor) -> _Plan:
    volumes, channels = x.shape[:2]
    if volumes > _MOST_VOLUMES:
        raise ValueError(f"at most {_MOST_VOLUMES} volumes at a time on a GPU, got {volumes}: split the batch")
    flat = x.view(volumes, channels, -1)  # the callers see to it that samples lie at one stride
    samples = flat.shape[2]
    strides = flat.stride(0), flat.stride(1), flat.stride(2)
    layout = "channels_last" if strides[1] == 1 else "contiguous"
    use = kernel.on(x.device, channels, layout, x.element_size())
    block_c = min(power_of_two(channels), use.channels) if strides[1] == 1 else 1
    block_s = use.elements // block_c
    columns = volumes * divided(channels, block_c)
    wanted = max(divided(use.programs * multiprocessors(x.device), max(columns, 1)), 1)
    tiles = max(divided(divided(samples, wanted), block_s), use.tiles)
    chunk = tiles * block_s
    return _Plan(volumes, channels, samples, strides, divided(samples, chunk), chunk, block_s, block_c, use.warps)


def alike(x: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """`x` with its samples and channels at the strides of `model`, by a copy if need be."""
    return x if x.stride()[1:] == model.stride()[1:] and _same_volumes(x, model) else torch.empty_like(model).copy_(x)


def _same_volumes(x: torch.Tensor, model: torch.Tensor) -> bool:
    return x.shape[0] == 1 or x.stride(0) == model.stride(0)


def add(
    left: torch.Tensor | None,
    right: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    out: torch.Tensor | None,
    statistics: bool,
) -> torch.Tensor:
    """Write left + right + bias to `out`, which may be either; return the statistics (N, P, 3, C) of what was written.

    Without `statistics` the result is empty.
    """
    plan = _plan(NORM_ADD, right)
    partial = right.new_empty((plan.volumes, plan.programs if statistics else 0, 3, plan.channels), dtype=torch.float32)
    launch(
        _add_kernel, plan.grid, right if left is None else alike(left, right), right, right if bias is None else bias,
        right if out is None else out, partial, *plan.arguments,
        HAS_LEFT=left is not None, HAS_BIAS=bias is not None, HAS_OUT=out is not None, HAS_PARTIAL=statistics,
        **plan.options,
    )  # fmt: skip
    return partial


def state(x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """State (N, 3, C), float32, of the norm of x + shift; `statistics` are those of `x`, taken here if absent."""
    if statistics is None or statistics.shape[1] == 0:
        statistics = add(None, x, None, out=None, statistics=True)
    volumes, chunks, _, channels = statistics.shape
    found = x.new_empty((volumes, 3, channels), dtype=torch.float32)
    group = channels // norm.groups
    launch(
        _norm_state_kernel, (norm.groups, volumes), statistics, found if shift is None else shift, found,
        channels, chunks, norm.eps, HAS_BIAS=shift is not None, **_group_tile(NORM_STATE, x, group),
    )  # fmt: skip
    return found


def normalize(
    x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(γ x̂ + β), and the state."""
    found = state(x, statistics, shift, norm)
    return apply(x, found, norm), found


def apply(x: torch.Tensor, state: torch.Tensor, norm: Norm, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """act(γ x̂ + β) in the dtype of `x`, written to `out`, which may be `x`, or to a new tensor."""
    out = torch.empty_like(x) if out is None else out
    plan = _plan(NORM_APPLY, x)
    launch(
        _norm_apply_kernel, plan.grid, x, state, norm.weight, norm.bias, out, *plan.arguments, SILU=norm.silu,
        **plan.options,
    )  # fmt: skip
    return out


def begin_gradient(
    grad: torch.Tensor, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, activation: bool
) -> tuple[Carry, torch.Tensor]:
    """What `finish_gradient` needs (`grad`, sums over chunks (N, P, 2, C)); on request, the activation once more."""
    plan = _plan(NORM_SUMS, x)
    grad = alike(grad, x)
    again = torch.empty_like(x) if activation else x.new_empty(0)
    partial = x.new_empty((plan.volumes, plan.programs, 2, plan.channels), dtype=torch.float32)
    launch(
        _norm_sums_kernel, plan.grid, grad, x, state, norm.weight, norm.bias, again if activation else x, partial,
        *plan.arguments, SILU=norm.silu, HAS_ACTIVATION=activation, **plan.options,
    )  # fmt: skip
    return (grad, partial), again


def finish_gradient(
    carry: Carry, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, other: torch.Tensor | None, over: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, plus `other`, and of γ, β and the bias folded into x, the last three (C,) float32.

    `over` allows the first to take the place of the gradient that `begin_gradient` was given.
    """
    grad, partial = carry
    means, weight, bias, shift = coefficients(partial, x, state, norm)
    plan = _plan(NORM_GRADIENT, x)
    out = grad if over else torch.empty_like(x)
    launch(
        _norm_gradient_kernel, plan.grid, grad, x, state, norm.weight, norm.bias, means,
        grad if other is None else alike(other, x), out, *plan.arguments,
        SILU=norm.silu, HAS_OTHER=other is not None, **plan.options,
    )  # fmt: skip
    return out, weight, bias, shift


def coefficients(
    partial: torch.Tensor, x: torch.Tensor, state: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the sums of `begin_gradient`: the groups' means of γ dz and γ dz·x̂ (N, 2, C), and the gradients of γ, β, bias.

    All float32; of `x` no element is read.
    """
    volumes, chunks, _, channels = partial.shape
    samples = math.prod(x.shape[2:])
    means = x.new_empty((volumes, 2, channels), dtype=torch.float32)
    # Three tensors, not views of one: an operator's outputs must not share memory.
    weight, bias, shift = (x.new_empty(channels, dtype=torch.float32) for _ in range(3))
    launch(
        _norm_coefficients_kernel, (norm.groups,), partial, state, norm.weight, means, weight, bias, shift,
        volumes, channels, chunks, 1.0 * samples, **_group_tile(NORM_COEFFICIENTS, x, channels // norm.groups),
    )  # fmt: skip
    return means, weight, bias, shift


def _group_tile(kernel: Kernel[Merging], x: torch.Tensor, group: int) -> dict[str, int]:
    """Channels of a group, and how many chunks of them a program merges at a time."""
    use = kernel.on(x.device, group, "contiguous", x.element_size())
    block = power_of_two(group)
    return {"GROUP": group, "BLOCK_P": max(use.numbers // block, 1), "BLOCK_G": block, "num_warps": use.warps}

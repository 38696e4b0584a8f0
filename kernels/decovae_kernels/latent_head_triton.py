"""The latent head in Triton: up to 8 channels, one launch and one read of μ and log σ² for z, KL and moments.

Import this module only where Triton is installed. Beyond 8 channels, whose numbers would not fit the registers, the
moments are a launch of their own, and the head goes over the channels 8 at a time.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# (a Triton kernel's arguments are pointers and scalars, which have no Python types, and its tuples grow)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from decovae_kernels import moments_triton
from decovae_kernels import packed as packing
from decovae_kernels._launch import launch
from decovae_kernels.configurations import HEAD, HEAD_GRADIENT
from decovae_kernels.moments_triton import (
    add_tile,
    affine,
    apply_affine,
    arrive,
    merge_rows,
    read_affine,
    spread_affine,
    store_packed,
    store_row,
)
from decovae_kernels.tiles import arrivals, layout_of, load_channels, power_of_two, store_channels, tiling

_MAX_CHANNELS = moments_triton.MAX_MERGED_CHANNELS


@triton.jit
def _normals(seed, offset, sample, group):
    """Four standard normals of each sample: `philox.normals`."""
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = (sample >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero + group, zero + tl.full((), offset, tl.int64).to(tl.uint32))
    first = _pair(_uniform(a), _uniform(b))
    return first + _pair(_uniform(c), _uniform(d))


@triton.jit
def _pair(u, v):
    """Box and Muller: √(−2 ln u) times the cosine and the sine of 2πv.

    The library's sine spills while it gets ready for angles of any size; here an eighth of a turn is enough.
    """
    quarter = tl.floor(4.0 * v + 0.5)
    x = (4.0 * v - quarter) * 1.5707963267948966
    s = x * x
    sine = x + x * s * (-1.6666667e-1 + s * (8.3333333e-3 + s * (-1.9841270e-4 + s * 2.7557319e-6)))
    cosine = 1.0 + s * (-0.5 + s * (4.1666667e-2 + s * (-1.3888889e-3 + s * 2.4801587e-5)))
    turns = quarter.to(tl.int32) & 3
    odd = (turns & 1) == 1
    radius = tl.sqrt(-2.0 * tl.log(u))
    real = tl.where(odd, sine, cosine) * tl.where((turns == 1) | (turns == 2), -radius, radius)
    imaginary = tl.where(odd, cosine, sine) * tl.where(turns >= 2, -radius, radius)
    return real, imaginary


@triton.jit
def _uniform(word):
    return ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _noise(seed, offset, sample, first_group, CHANNELS: tl.constexpr):
    """ε of the channels as a tuple of C vectors."""
    noise = ()
    for group in tl.static_range((CHANNELS + 3) // 4):
        noise = noise + _normals(seed, offset, sample, first_group + group)
    return noise


# `start` is another number in every step: neither its value nor its size may ask for a kernel of its own.
@triton.jit(do_not_specialize=["start"])
def _head_kernel(
    mu_ptr, log_variance_ptr, z_ptr, seed_ptr, rows_ptr, counter_ptr, packed_ptr, kl_ptr,
    offset, start: tl.int64, first_group, length, tiles_per_block, tiles, per_element,
    stride_block, stride_channel, stride_sample, spread_block, spread_channel, spread_sample,
    z_block, z_channel, z_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr, MOMENTS: tl.constexpr,
):  # fmt: skip
    """z; each program's sum of the KL divergence; with MOMENTS, that and the moments of all, by the last to finish."""
    GROUPS: tl.constexpr = LANES // WIDTH
    SIZE: tl.constexpr = 1 + CHANNELS + CHANNELS * CHANNELS
    program = tl.program_id(0)
    seed = tl.load(seed_ptr)
    count = tl.zeros((GROUPS,), tl.float32)
    divergence = tl.zeros((GROUPS,), tl.float32)
    shifts = ()
    means = ()
    moments = ()
    for i in tl.static_range(CHANNELS):
        shifts = shifts + (tl.load(mu_ptr + tl.full((), i, tl.int64) * stride_channel).to(tl.float32),)
    if MOMENTS:
        block = program // tiles_per_block
        tile = program % tiles_per_block
        inside = tile * LANES + tl.arange(0, LANES) < length
        channels = load_channels(
            mu_ptr, block, tile, inside, stride_block, stride_channel, stride_sample, CHANNELS, LANES, LAYOUT, True
        )
        seen = tl.sum(inside.to(tl.float32))
        for i in tl.static_range(CHANNELS):
            means = means + (count + tl.sum(tl.where(inside, channels[i] - shifts[i], 0.0)) / seen,)
            for _ in tl.static_range(i + 1):
                moments = moments + (tl.zeros((GROUPS,), tl.float32),)

    for index in range(program, tiles, tl.num_programs(0)):
        block = index // tiles_per_block
        tile = index % tiles_per_block
        place = tile * LANES + tl.arange(0, LANES)
        inside = place < length
        mu = load_channels(
            mu_ptr, block, tile, inside, stride_block, stride_channel, stride_sample, CHANNELS, LANES, LAYOUT, MASKED
        )
        log_variance = load_channels(
            log_variance_ptr, block, tile, inside, spread_block, spread_channel, spread_sample,
            CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip
        sample = start + block.to(tl.int64) * length + tile * LANES + tl.arange(0, LANES)
        noise = _noise(seed, offset, sample, first_group, CHANNELS)
        z = ()
        shifted = ()
        for i in tl.static_range(CHANNELS):
            deviation = tl.exp(0.5 * log_variance[i])
            z = z + (mu[i] + deviation * noise[i],)
            term = mu[i] * mu[i] + deviation * deviation - log_variance[i] - 1.0
            if MASKED:
                term = tl.where(inside, term, 0.0)
            divergence += tl.sum(tl.reshape(term, (GROUPS, WIDTH)), axis=1)
            shifted = shifted + (mu[i] - shifts[i],)
        store_channels(z_ptr, z, block, tile, inside, z_block, z_channel, z_sample, CHANNELS, LANES, LAYOUT, MASKED)
        if MOMENTS:
            count, means, moments = add_tile(count, means, moments, shifted, inside, CHANNELS, LANES, WIDTH, MASKED)

    row_ptr = rows_ptr + program * (SIZE + 1)
    tl.store(row_ptr + SIZE, tl.sum(divergence.to(tl.float64)))
    if MOMENTS:
        store_row(row_ptr, count, means, moments, shifts, CHANNELS)
        if arrive(counter_ptr):
            number, mean, scatter, total = merge_rows(rows_ptr, tl.num_programs(0), CHANNELS, ROWS, PARTS, 1)
            store_packed(packed_ptr, number, mean, scatter, CHANNELS, ROWS)
            tl.store(kl_ptr, (total * (0.5 * per_element)).to(tl.float32))
            tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=["start"])
def _head_gradient_kernel(
    mu_ptr, log_variance_ptr, grad_z_ptr, out_mu_ptr, out_log_variance_ptr, seed_ptr,
    packed_ptr, grad_kl_ptr, direction_ptr, scratch_ptr,
    offset, start: tl.int64, first_group, replicas, length, tiles_per_block, tiles, per_element,
    stride_block, stride_channel, stride_sample, spread_block, spread_channel, spread_sample,
    grad_block, grad_channel, grad_sample, out_block, out_channel, out_sample,
    out_spread_block, out_spread_channel, out_spread_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr,
    SAMPLED: tl.constexpr, DIVERGENCE: tl.constexpr, MOMENTS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Both gradients of a tile; SAMPLED, DIVERGENCE and MOMENTS say which outputs have one, ADDED that one is there."""
    program = tl.program_id(0)
    seed = tl.load(seed_ptr)
    if MOMENTS:
        scratch_ptr += program * (CHANNELS * CHANNELS + 2 * CHANNELS)
        matrix, centre, constant = affine(packed_ptr, direction_ptr, None, replicas, CHANNELS, ROWS, False)
        spread_affine(scratch_ptr, matrix, centre, constant, CHANNELS, ROWS)
        if CHANNELS <= 4:
            numbers = read_affine(scratch_ptr, CHANNELS)
    weight = 0.0
    if DIVERGENCE:
        weight = tl.load(grad_kl_ptr).to(tl.float32) * per_element

    for index in range(program, tiles, tl.num_programs(0)):
        block = index // tiles_per_block
        tile = index % tiles_per_block
        place = tile * LANES + tl.arange(0, LANES)
        inside = place < length
        mu = load_channels(
            mu_ptr, block, tile, inside, stride_block, stride_channel, stride_sample, CHANNELS, LANES, LAYOUT, MASKED
        )
        log_variance = load_channels(
            log_variance_ptr, block, tile, inside, spread_block, spread_channel, spread_sample,
            CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip
        if MOMENTS:
            if CHANNELS > 4:
                numbers = read_affine(scratch_ptr, CHANNELS)
            along = apply_affine(numbers, mu, CHANNELS)
        elif ADDED:
            along = load_channels(
                out_mu_ptr, block, tile, inside, out_block, out_channel, out_sample, CHANNELS, LANES, LAYOUT, MASKED
            )
        if SAMPLED:
            upstream = load_channels(
                grad_z_ptr, block, tile, inside, grad_block, grad_channel, grad_sample, CHANNELS, LANES, LAYOUT, MASKED
            )
            sample = start + block.to(tl.int64) * length + tile * LANES + tl.arange(0, LANES)
            noise = _noise(seed, offset, sample, first_group, CHANNELS)
        along_mu = ()
        along_spread = ()
        for i in tl.static_range(CHANNELS):
            deviation = tl.exp(0.5 * log_variance[i])
            to_mu = weight * mu[i]
            to_spread = (0.5 * weight) * (deviation * deviation - 1.0)
            if SAMPLED:
                to_mu += upstream[i]
                to_spread += 0.5 * upstream[i] * deviation * noise[i]
            if MOMENTS or ADDED:
                to_mu += along[i]
            along_mu = along_mu + (to_mu,)
            along_spread = along_spread + (to_spread,)
        store_channels(
            out_mu_ptr, along_mu, block, tile, inside, out_block, out_channel, out_sample,
            CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip
        store_channels(
            out_log_variance_ptr, along_spread, block, tile, inside,
            out_spread_block, out_spread_channel, out_spread_sample, CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip


def forward(
    mu: torch.Tensor, log_variance: torch.Tensor, z: torch.Tensor, seed: torch.Tensor, offset: int, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write z (B, C, L); return the KL divergence () and the packed moments of `mu`."""
    channels = mu.shape[1]
    if channels <= _MAX_CHANNELS:
        packed = mu.new_empty(packing.size(channels), dtype=torch.float64)
        kl = mu.new_empty((), dtype=torch.float32)
        _launch_forward(mu, log_variance, z, seed, offset, start, 0, packed, kl)
        return kl, packed
    total = torch.zeros((), dtype=torch.float64, device=mu.device)
    for first in range(0, channels, _MAX_CHANNELS):
        some = slice(first, first + _MAX_CHANNELS)
        rows = _launch_forward(
            mu[:, some], log_variance[:, some], z[:, some], seed, offset, start, first // 4, None, None
        )
        total += rows[:, -1].sum()
    return total * (0.5 / mu.numel()), moments_triton.moments(mu)


def backward(
    mu: torch.Tensor,
    log_variance: torch.Tensor,
    grad_z: torch.Tensor | None,
    out_mu: torch.Tensor,
    out_log_variance: torch.Tensor,
    seed: torch.Tensor,
    offset: int,
    start: int,
    packed: torch.Tensor,
    grad_kl: torch.Tensor | None,
    direction: torch.Tensor | None,
    replicas: int,
) -> None:
    """Write both gradients (B, C, L) for whichever outputs have one."""
    channels = mu.shape[1]
    if direction is not None:
        direction = direction.contiguous()
    added = channels > _MAX_CHANNELS and direction is not None
    if added and direction is not None:
        moments_triton.input_gradient(mu, packed, direction, None, replicas, out=out_mu)
    for first in range(0, channels, _MAX_CHANNELS):
        some = slice(first, first + _MAX_CHANNELS)
        tensors = [x[:, some] for x in (mu, log_variance, mu if grad_z is None else grad_z, out_mu, out_log_variance)]
        _launch_backward(
            tensors, seed, offset, start, first // 4, packed, grad_kl, None if added else direction, replicas,
            per_element=1 / mu.numel(), sampled=grad_z is not None, added=added,
        )  # fmt: skip


def _launch_forward(
    mu: torch.Tensor,
    log_variance: torch.Tensor,
    z: torch.Tensor,
    seed: torch.Tensor,
    offset: int,
    start: int,
    first_group: int,
    packed: torch.Tensor | None,
    kl: torch.Tensor | None,
) -> torch.Tensor:
    """Fill what is given; return the programs' rows: packed moments if `packed` is given, then the KL's sum."""
    _, channels, length = mu.shape
    layout = _common_layout(mu, log_variance, z)
    walk = tiling(HEAD, mu, layout)
    rows = power_of_two(channels)
    partial = mu.new_empty((walk.programs, packing.size(channels) + 1), dtype=torch.float64)
    launch(
        _head_kernel, (walk.programs,),
        mu, log_variance, z, seed, partial, None if packed is None else arrivals(mu.device), packed, kl,
        offset, start, first_group, length, walk.tiles_per_block, walk.tiles, 1 / mu.numel(),
        *mu.stride(), *log_variance.stride(), *z.stride(),
        CHANNELS=channels, ROWS=rows, LANES=walk.lanes, WIDTH=walk.width, LAYOUT=layout, MASKED=walk.masked,
        PARTS=moments_triton.merge_parts(rows, walk.warps), MOMENTS=packed is not None, num_warps=walk.warps,
    )  # fmt: skip
    return partial


def _launch_backward(
    tensors: list[torch.Tensor],
    seed: torch.Tensor,
    offset: int,
    start: int,
    first_group: int,
    packed: torch.Tensor,
    grad_kl: torch.Tensor | None,
    direction: torch.Tensor | None,
    replicas: int,
    *,
    per_element: float,
    sampled: bool,
    added: bool,
) -> None:
    mu, log_variance, grad_z, out_mu, out_log_variance = tensors
    _, channels, length = mu.shape
    layout = _common_layout(*tensors)
    walk = tiling(HEAD_GRADIENT, mu, layout)
    scratch = None
    if direction is not None:
        scratch = mu.new_empty(walk.programs * (channels**2 + 2 * channels), dtype=torch.float32)
    launch(
        _head_gradient_kernel, (walk.programs,),
        mu, log_variance, grad_z, out_mu, out_log_variance, seed, packed, grad_kl, direction, scratch,
        offset, start, first_group, replicas, length, walk.tiles_per_block, walk.tiles, per_element,
        *mu.stride(), *log_variance.stride(), *grad_z.stride(), *out_mu.stride(), *out_log_variance.stride(),
        CHANNELS=channels, ROWS=power_of_two(channels), LANES=walk.lanes, LAYOUT=layout, MASKED=walk.masked,
        SAMPLED=sampled, DIVERGENCE=grad_kl is not None, MOMENTS=direction is not None, ADDED=added,
        num_warps=walk.warps,
    )  # fmt: skip


def _common_layout(*blocks: torch.Tensor) -> str:
    layouts = {layout_of(x) for x in blocks}
    if len(layouts) > 1:
        return "strided"
    # Eight channels of several neighbouring samples at once would not fit the registers.
    planes = blocks[0].shape[1] == 8 and all(x.stride(2) == 1 for x in blocks)
    return "planes" if planes else layouts.pop()

"""Channel moments in Triton: in registers up to 16 channels, by matrix products of float32 up to 64.

Import this module only where Triton is installed. Up to 8 channels the forward is one launch: every program reduces its
tiles, and the one that finishes last merges all and evaluates the losses; with more channels the host merges what the
programs found. The backward is one launch.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# (a Triton kernel's arguments are pointers and scalars, which have no Python types, and its tuples grow)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from decovae_kernels import packed as packing
from decovae_kernels._launch import launch
from decovae_kernels.configurations import LOSS, MOMENTS, MOMENTS_DOT, MOMENTS_GRADIENT, MOMENTS_GRADIENT_DOT
from decovae_kernels.terms import Terms
from decovae_kernels.terms import loss_and_direction as evaluate_in_torch
from decovae_kernels.tiles import (
    arrivals,
    divided,
    layout_of,
    load_channels,
    multiprocessors,
    power_of_two,
    store_channels,
    tiling,
)

# Up to so many channels each thread keeps all second moments; up to so many the last program also merges them all.
MAX_REGISTER_CHANNELS = 16
MAX_MERGED_CHANNELS = 8
# A matrix of more channels in float64 does not fit one program's registers.
_MAX_LOSS_CHANNELS = 32

# float64 numbers of that merge that a warp has in flight, 16 a thread.
_MERGE_NUMBERS = 512


@triton.jit
def add_tile(
    count, means, moments, channels, inside,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Merge a tile into each thread's running moments: WIDTH neighbouring samples at a time (Chan's formula)."""
    GROUPS: tl.constexpr = LANES // WIDTH
    if MASKED:
        valid = tl.reshape(inside, (GROUPS, WIDTH))
        total = count + tl.sum(valid.to(tl.float32), axis=1)
        inverse = 1.0 / tl.maximum(total, 1.0)
    else:
        total = count + WIDTH
        inverse = 1.0 / total
    deviations = ()
    sums = ()
    new_means = ()
    for i in tl.static_range(CHANNELS):
        deviation = tl.reshape(channels[i], (GROUPS, WIDTH)) - means[i][:, None]
        if MASKED:
            deviation = tl.where(valid, deviation, 0.0)
        deviations = deviations + (deviation,)
        sums = sums + (tl.sum(deviation, axis=1),)
        new_means = new_means + (means[i] + sums[i] * inverse,)
    new_moments = ()
    for i in tl.static_range(CHANNELS):
        for j in tl.static_range(i + 1):
            product = tl.sum(deviations[i] * deviations[j], axis=1) - sums[i] * (sums[j] * inverse)
            new_moments = new_moments + (moments[i * (i + 1) // 2 + j] + product,)
    return total, new_means, new_moments


@triton.jit
def _load_shifted(
    x_ptr, shifts, index, tiles_per_block, length, stride_block, stride_channel, stride_sample,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile number `index` of all blocks, minus `shifts`, and which of its samples exist."""
    block = index // tiles_per_block
    tile = index % tiles_per_block
    inside = tile * LANES + tl.arange(0, LANES) < length
    channels = load_channels(
        x_ptr, block, tile, inside, stride_block, stride_channel, stride_sample, CHANNELS, LANES, LAYOUT, MASKED
    )
    shifted = ()
    for i in tl.static_range(CHANNELS):
        shifted = shifted + (channels[i] - shifts[i],)
    return shifted, inside


@triton.jit
def store_row(row_ptr, count, means, moments, shifts, CHANNELS: tl.constexpr):
    """Merge the threads' moments and write them packed. Their sum is in float64: its rounding would be the largest."""
    number = tl.sum(count)
    tl.store(row_ptr, number.to(tl.float64))
    offsets = ()
    for i in tl.static_range(CHANNELS):
        mean = tl.sum(means[i] * count) / number
        tl.store(row_ptr + 1 + i, shifts[i].to(tl.float64) + mean.to(tl.float64))
        offsets = offsets + (means[i] - mean,)
    for i in tl.static_range(CHANNELS):
        for j in tl.static_range(i + 1):
            spread = moments[i * (i + 1) // 2 + j] + offsets[i] * (offsets[j] * count)
            scatter = tl.sum(spread.to(tl.float64))
            tl.store(row_ptr + 1 + CHANNELS + i * CHANNELS + j, scatter)
            if i != j:
                tl.store(row_ptr + 1 + CHANNELS + j * CHANNELS + i, scatter)


@triton.jit
def merge_rows(rows_ptr, rows, CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, EXTRA: tl.constexpr):
    """Count, mean (ROWS,) and scatter (ROWS, ROWS) of all packed rows, and the sum of their EXTRA number, in float64.

    Means are measured from the first row's, so that equal means differ by exactly zero. Read past the L1 cache, which
    does not see what other multiprocessors wrote.
    """
    SIZE: tl.constexpr = 1 + CHANNELS + CHANNELS * CHANNELS + EXTRA
    channel = tl.arange(0, ROWS)
    is_channel = channel < CHANNELS
    origin = tl.load(rows_ptr + 1 + channel, mask=is_channel, other=0.0, cache_modifier=".cg")
    entry = 1 + CHANNELS + channel[:, None] * CHANNELS + channel[None, :]
    is_entry = is_channel[:, None] & is_channel[None, :]

    counts = tl.zeros((PARTS,), tl.float64)
    extra = tl.zeros((PARTS,), tl.float64)
    offset = tl.zeros((ROWS,), tl.float64)
    second = tl.zeros((ROWS, ROWS), tl.float64)
    for start in range(0, rows, PARTS):
        part = start + tl.arange(0, PARTS)
        here = part < rows
        row_ptr = rows_ptr + part * SIZE
        count = tl.load(row_ptr, mask=here, other=0.0, cache_modifier=".cg")
        valid = here[:, None] & is_channel[None, :]
        mean = tl.load(row_ptr[:, None] + 1 + channel[None, :], mask=valid, other=0.0, cache_modifier=".cg")
        away = tl.where(valid, mean - origin[None, :], 0.0)
        within = tl.load(
            row_ptr[:, None, None] + entry[None, :, :],
            mask=here[:, None, None] & is_entry[None, :, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        counts += count
        if EXTRA:
            extra += tl.load(row_ptr + SIZE - 1, mask=here, other=0.0, cache_modifier=".cg")
        offset += tl.sum(away * count[:, None], axis=0)
        second += tl.sum(within + away[:, :, None] * (away * count[:, None])[:, None, :], axis=0)
    number = tl.sum(counts)
    offset = offset / number
    return number, origin + offset, second - offset[:, None] * (offset * number)[None, :], tl.sum(extra)


@triton.jit
def _evaluate(
    number, scatter, sid, covariance, variance, squared_variance, gamma, CHANNELS: tl.constexpr, ROWS: tl.constexpr
):
    """Loss and its derivative with respect to the scatter (ROWS, ROWS), float64: `terms.loss_and_direction`."""
    i = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    diagonal = (i == j) & (i < CHANNELS)
    # Multiplied, not selected: 0 · NaN keeps a non-finite diagonal visible, even with a single channel.
    off_diagonal = tl.where((i < CHANNELS) & (j < CHANNELS) & (i != j), 1.0, 0.0).to(tl.float64)
    per_sample = tl.where(number > 1.0, 1.0 / (number - 1.0), float("nan"))
    own = tl.where(diagonal, scatter, 0.0)
    own = tl.where(tl.abs(own) == float("inf"), float("nan"), own)
    second_i = tl.sum(own, axis=1)[:, None]
    second_j = tl.sum(own, axis=0)[None, :]

    one = tl.full((), 1.0, tl.float64)
    loss = 0.0 * per_sample
    gradient = 0.0 * scatter
    if sid != 0:
        weight = sid * one / (CHANNELS * CHANNELS)
        norm_i = tl.where(second_i == 0, 0.0, 1.0 / tl.sqrt(tl.where(second_i == 0, 1.0, second_i)))
        norm_j = tl.where(second_j == 0, 0.0, 1.0 / tl.sqrt(tl.where(second_j == 0, 1.0, second_j)))
        norms = norm_i * norm_j * off_diagonal
        correlation = scatter * norms
        squares = tl.sum(correlation * correlation, axis=1)
        loss += weight * tl.sum(squares)
        gradient += 2.0 * weight * (correlation * norms - tl.where(diagonal, squares[:, None] * norm_i * norm_j, 0.0))
    if covariance != 0:
        weight = covariance * one / (CHANNELS * CHANNELS)
        sigma = scatter * (off_diagonal * per_sample)
        loss += weight * tl.sum(tl.sum(sigma * sigma, axis=1))
        gradient += sigma * (2.0 * weight * per_sample)
    if variance != 0:
        weight = variance * one / CHANNELS
        deviation = tl.sqrt(own * per_sample)
        shortfall = gamma * one - deviation
        shortfall = tl.where(diagonal, tl.where(shortfall < 0, 0.0, shortfall), 0.0)
        loss += weight * tl.sum(tl.sum(shortfall * shortfall, axis=1))
        slope = weight * per_sample * shortfall / tl.where(own == 0, 1.0, deviation)
        gradient -= tl.where(own == 0, 0.0, slope)
    if squared_variance != 0:
        weight = squared_variance * one / CHANNELS
        excess = tl.where(diagonal, own * per_sample - gamma * one, 0.0)
        loss += weight * tl.sum(tl.sum(excess * excess, axis=1))
        gradient += 2.0 * weight * per_sample * excess
    return loss, gradient


@triton.jit
def store_packed(packed_ptr, first, vector, matrix, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    channel = tl.arange(0, ROWS)
    is_channel = channel < CHANNELS
    tl.store(packed_ptr, first)
    tl.store(packed_ptr + 1 + channel, vector, mask=is_channel)
    entry = 1 + CHANNELS + channel[:, None] * CHANNELS + channel[None, :]
    tl.store(packed_ptr + entry, matrix, mask=is_channel[:, None] & is_channel[None, :])


@triton.jit
def arrive(counter_ptr):
    """Whether this program is the last of all to get here, and so sees what the others wrote before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    tl.debug_barrier()
    return last


@triton.jit
def _moments_kernel(
    x_ptr, rows_ptr, counter_ptr, packed_ptr, loss_ptr, direction_ptr,
    length, tiles_per_block, tiles, stride_block, stride_channel, stride_sample,
    sid, covariance, variance, squared_variance, gamma,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr, MASKED: tl.constexpr,
    PARTS: tl.constexpr, MERGED: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Packed moments of each program's tiles, every num_programs-th; with MERGED of all; with LOSS, the losses."""
    GROUPS: tl.constexpr = LANES // WIDTH
    program = tl.program_id(0)
    shifts = ()
    for i in tl.static_range(CHANNELS):
        shifts = shifts + (tl.load(x_ptr + tl.full((), i, tl.int64) * stride_channel).to(tl.float32),)

    # Threads start from the mean of the program's first tile: from zero, a first sample far from all others would
    # cost them their digits.
    tile, inside = _load_shifted(
        x_ptr, shifts, program, tiles_per_block, length, stride_block, stride_channel, stride_sample,
        CHANNELS, LANES, LAYOUT, True,
    )  # fmt: skip
    seen = tl.sum(inside.to(tl.float32))
    count = tl.zeros((GROUPS,), tl.float32)
    means = ()
    moments = ()
    for i in tl.static_range(CHANNELS):
        means = means + (count + tl.sum(tl.where(inside, tile[i], 0.0)) / seen,)
        for _ in tl.static_range(i + 1):
            moments = moments + (tl.zeros((GROUPS,), tl.float32),)

    for index in range(program, tiles, tl.num_programs(0)):
        tile, inside = _load_shifted(
            x_ptr, shifts, index, tiles_per_block, length, stride_block, stride_channel, stride_sample,
            CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip
        count, means, moments = add_tile(count, means, moments, tile, inside, CHANNELS, LANES, WIDTH, MASKED)

    row_ptr = rows_ptr + program * (1 + CHANNELS + CHANNELS * CHANNELS)
    store_row(row_ptr, count, means, moments, shifts, CHANNELS)
    if MERGED:
        # The last to arrive merges every row; in the rows' order, so the bits do not depend on which it is.
        if arrive(counter_ptr):
            number, mean, scatter, _unused = merge_rows(rows_ptr, tl.num_programs(0), CHANNELS, ROWS, PARTS, 0)
            store_packed(packed_ptr, number, mean, scatter, CHANNELS, ROWS)
            if LOSS:
                loss, gradient = _evaluate(
                    number, scatter, sid, covariance, variance, squared_variance, gamma, CHANNELS, ROWS
                )
                tl.store(loss_ptr, loss.to(tl.float32))
                store_packed(direction_ptr, 0.0 * number, 0.0 * mean, gradient, CHANNELS, ROWS)
            tl.store(counter_ptr, 0)


@triton.jit
def _moments_dot_kernel(
    x_ptr, rows_ptr, length, tiles_per_block, tiles, stride_block, stride_channel, stride_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Packed moments of a program's tiles, for the host to merge: centred tiles times their transpose."""
    program = tl.program_id(0)
    channel = tl.arange(0, ROWS)
    is_channel = channel < CHANNELS
    channel_ptr = x_ptr + channel.to(tl.int64) * stride_channel
    shift = tl.load(channel_ptr, mask=is_channel, other=0.0).to(tl.float32)
    count = tl.full((), 0.0, tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    scatter = tl.zeros((ROWS, ROWS), tl.float32)
    for index in range(program, tiles, tl.num_programs(0)):
        sample = (index % tiles_per_block) * LANES + tl.arange(0, LANES)
        inside = sample < length
        pointers = channel_ptr[:, None] + (index // tiles_per_block).to(tl.int64) * stride_block
        pointers += sample.to(tl.int64)[None, :] * stride_sample
        valid = is_channel[:, None] & inside[None, :]
        value = tl.load(pointers, mask=valid, other=0.0).to(tl.float32) - shift[:, None]
        here = tl.sum(inside.to(tl.float32))
        centre = tl.sum(tl.where(valid, value, 0.0), axis=1) / here
        centred = tl.where(valid, value - centre[:, None], 0.0)
        total = count + here
        away = centre - mean
        scatter += tl.dot(centred, tl.trans(centred), input_precision="ieee")
        scatter += away[:, None] * (away * (count * here / total))[None, :]
        mean += away * (here / total)
        count = total
    row_ptr = rows_ptr + program * (1 + CHANNELS + CHANNELS * CHANNELS)
    mean = shift.to(tl.float64) + mean.to(tl.float64)
    store_packed(row_ptr, count.to(tl.float64), mean, scatter.to(tl.float64), CHANNELS, ROWS)


@triton.jit
def _loss_kernel(
    packed_ptr, loss_ptr, direction_ptr, sid, covariance, variance, squared_variance, gamma,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The losses of packed moments, and their derivative."""
    channel = tl.arange(0, ROWS)
    is_channel = channel < CHANNELS
    entry = 1 + CHANNELS + channel[:, None] * CHANNELS + channel[None, :]
    scatter = tl.load(packed_ptr + entry, mask=is_channel[:, None] & is_channel[None, :], other=0.0)
    loss, gradient = _evaluate(
        tl.load(packed_ptr), scatter, sid, covariance, variance, squared_variance, gamma, CHANNELS, ROWS
    )
    tl.store(loss_ptr, loss)
    store_packed(direction_ptr, 0.0 * loss, tl.zeros((ROWS,), tl.float64), gradient, CHANNELS, ROWS)


@triton.jit
def affine(
    packed_ptr, direction_ptr, scale_ptr, replicas,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Matrix (ROWS, ROWS), centre (ROWS,) and constant (ROWS,) of the gradient matrix · (x − centre) + constant.

    float32, from float64: what float32 drops of the mean is in the constant.
    """
    row = tl.arange(0, ROWS)
    is_channel = row < CHANNELS
    scale = replicas + tl.zeros((), tl.float64)
    if SCALED:
        scale *= tl.load(scale_ptr).to(tl.float64)
    entry_ptr = direction_ptr + 1 + CHANNELS
    valid = is_channel[:, None] & is_channel[None, :]
    above = tl.load(entry_ptr + row[:, None] * CHANNELS + row[None, :], mask=valid, other=0.0)
    below = tl.load(entry_ptr + row[None, :] * CHANNELS + row[:, None], mask=valid, other=0.0)
    matrix = (above + below) * scale
    mean = tl.load(packed_ptr + 1 + row, mask=is_channel, other=0.0)
    centre = mean.to(tl.float32)
    constant = tl.load(direction_ptr + 1 + row, mask=is_channel, other=0.0) * (scale / tl.load(packed_ptr))
    constant -= tl.sum(matrix * (mean - centre.to(tl.float64))[None, :], axis=1)
    return matrix.to(tl.float32), centre, constant.to(tl.float32)


@triton.jit
def spread_affine(scratch_ptr, matrix, centre, constant, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Put `affine`'s results where every thread can read every number: C², C and C float32, the program's own."""
    row = tl.arange(0, ROWS)
    is_channel = row < CHANNELS
    valid = is_channel[:, None] & is_channel[None, :]
    tl.store(scratch_ptr + row[:, None] * CHANNELS + row[None, :], matrix, mask=valid)
    tl.store(scratch_ptr + CHANNELS * CHANNELS + row, centre, mask=is_channel)
    tl.store(scratch_ptr + CHANNELS * CHANNELS + CHANNELS + row, constant, mask=is_channel)
    tl.debug_barrier()


@triton.jit
def read_affine(scratch_ptr, CHANNELS: tl.constexpr):
    """What `spread_affine` wrote: C², C and C numbers in one tuple."""
    numbers = ()
    for i in tl.static_range(CHANNELS * CHANNELS + 2 * CHANNELS):
        numbers = numbers + (tl.load(scratch_ptr + i),)
    return numbers


@triton.jit
def apply_affine(numbers, channels, CHANNELS: tl.constexpr):
    """matrix · (x − centre) + constant of a tuple of C vectors."""
    CENTRE: tl.constexpr = CHANNELS * CHANNELS
    centred = ()
    for j in tl.static_range(CHANNELS):
        centred = centred + (channels[j] - numbers[CENTRE + j],)
    result = ()
    for i in tl.static_range(CHANNELS):
        value = numbers[CENTRE + CHANNELS + i] + centred[0] * numbers[i * CHANNELS]
        for j in tl.static_range(1, CHANNELS):
            value += centred[j] * numbers[i * CHANNELS + j]
        result = result + (value,)
    return result


@triton.jit
def _gradient_kernel(
    x_ptr, packed_ptr, direction_ptr, scale_ptr, scratch_ptr, out_ptr, replicas,
    length, tiles_per_block, tiles, stride_block, stride_channel, stride_sample,
    out_stride_block, out_stride_channel, out_stride_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    LAYOUT: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """replicas · scale · (grad_mean / n + (G + Gᵀ)(x − mean)), up to 16 channels."""
    scratch_ptr += tl.program_id(0) * (CHANNELS * CHANNELS + 2 * CHANNELS)
    matrix, centre, constant = affine(packed_ptr, direction_ptr, scale_ptr, replicas, CHANNELS, ROWS, SCALED)
    spread_affine(scratch_ptr, matrix, centre, constant, CHANNELS, ROWS)
    if CHANNELS <= 4:  # more would not stay in registers: they are read again for every tile, from the L1 cache
        numbers = read_affine(scratch_ptr, CHANNELS)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = index // tiles_per_block
        tile = index % tiles_per_block
        inside = tile * LANES + tl.arange(0, LANES) < length
        channels = load_channels(
            x_ptr, block, tile, inside, stride_block, stride_channel, stride_sample,
            CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip
        if CHANNELS > 4:
            numbers = read_affine(scratch_ptr, CHANNELS)
        store_channels(
            out_ptr, apply_affine(numbers, channels, CHANNELS), block, tile, inside,
            out_stride_block, out_stride_channel, out_stride_sample, CHANNELS, LANES, LAYOUT, MASKED,
        )  # fmt: skip


@triton.jit
def _gradient_dot_kernel(
    x_ptr, packed_ptr, direction_ptr, scale_ptr, scratch_ptr, out_ptr, replicas,
    length, tiles_per_block, tiles, stride_block, stride_channel, stride_sample,
    out_stride_block, out_stride_channel, out_stride_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The same for more channels, by matrix products, 16 columns of the matrix at a time."""
    PART: tl.constexpr = 16
    row = tl.arange(0, ROWS)
    is_channel = row < CHANNELS
    scale = replicas + tl.zeros((), tl.float64)
    if SCALED:
        scale *= tl.load(scale_ptr).to(tl.float64)
    scratch_ptr += tl.program_id(0) * ROWS * ROWS
    entry_ptr = direction_ptr + 1 + CHANNELS
    constant = tl.load(direction_ptr + 1 + row, mask=is_channel, other=0.0) * (scale / tl.load(packed_ptr))
    for first in tl.static_range(0, ROWS, PART):
        column = first + tl.arange(0, PART)
        valid = is_channel[:, None] & (column < CHANNELS)[None, :]
        above = tl.load(entry_ptr + row[:, None] * CHANNELS + column[None, :], mask=valid, other=0.0)
        below = tl.load(entry_ptr + column[None, :] * CHANNELS + row[:, None], mask=valid, other=0.0)
        matrix = (above + below) * scale
        mean = tl.load(packed_ptr + 1 + column, mask=column < CHANNELS, other=0.0)
        # What float32 drops of the mean is in the constant.
        constant -= tl.sum(matrix * (mean - mean.to(tl.float32).to(tl.float64))[None, :], axis=1)
        tl.store(scratch_ptr + row[:, None] * ROWS + column[None, :], matrix.to(tl.float32))
    tl.debug_barrier()

    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block = (index // tiles_per_block).to(tl.int64)
        place = (index % tiles_per_block) * LANES + tl.arange(0, LANES)
        inside = place < length
        sample = place.to(tl.int64)[None, :]
        result = tl.zeros((ROWS, LANES), tl.float32) + constant.to(tl.float32)[:, None]
        for first in tl.static_range(0, ROWS, PART):
            source = first + tl.arange(0, PART)
            here = source < CHANNELS
            weight = tl.load(scratch_ptr + row[:, None] * ROWS + source[None, :])
            centre = tl.load(packed_ptr + 1 + source, mask=here, other=0.0).to(tl.float32)
            pointers = x_ptr + block * stride_block + source.to(tl.int64)[:, None] * stride_channel
            value = tl.load(pointers + sample * stride_sample, mask=here[:, None] & inside[None, :], other=0.0)
            result += tl.dot(weight, value.to(tl.float32) - centre[:, None], input_precision="ieee")
        pointers = out_ptr + block * out_stride_block + row.to(tl.int64)[:, None] * out_stride_channel
        wanted = is_channel[:, None] & inside[None, :]
        tl.store(pointers + sample * out_stride_sample, result.to(out_ptr.dtype.element_ty), mask=wanted)


def moments(blocks: torch.Tensor) -> torch.Tensor:
    """Packed moments of `blocks` (B, C, L), float16, bfloat16 or float32, 1 ≤ C ≤ 64."""
    if blocks.shape[1] > MAX_MERGED_CHANNELS:
        return _moments_of_many_channels(blocks)
    packed = _empty_packed(blocks)
    _launch_moments(blocks, packed, None, None, Terms())
    return packed


def decorrelation(blocks: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (), float32, packed moments, and the loss's derivative with respect to them, of `blocks` as in `moments`."""
    if blocks.shape[1] > MAX_MERGED_CHANNELS:
        packed = _moments_of_many_channels(blocks)
        loss, direction = loss_and_direction(packed, terms)
        return loss.float(), packed, direction
    packed, direction = _empty_packed(blocks), _empty_packed(blocks)
    loss = blocks.new_empty((), dtype=torch.float32)
    _launch_moments(blocks, packed, loss, direction, terms)
    return loss, packed, direction


def loss_and_direction(packed: torch.Tensor, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (), float64, and its derivative with respect to `packed`."""
    channels = packing.channels_of(packed)
    if channels > _MAX_LOSS_CHANNELS:
        return evaluate_in_torch(packed, terms)
    packed = packed.contiguous()
    loss, direction = packed.new_empty(()), torch.empty_like(packed)
    use = LOSS.on(packed.device, channels, "contiguous", packed.element_size())
    launch(
        _loss_kernel, (1,), packed, loss, direction, *terms, CHANNELS=channels, ROWS=power_of_two(channels),
        num_warps=use.warps,
    )  # fmt: skip
    return loss, direction


def input_gradient(
    blocks: torch.Tensor,
    packed: torch.Tensor,
    direction: torch.Tensor,
    scale: torch.Tensor | None,
    replicas: int,
    *,
    out: torch.Tensor,
) -> None:
    """Write the gradient with respect to `blocks` (B, C, L) into `out`, of the same shape and dtype."""
    volumes, channels, length = blocks.shape
    rows = power_of_two(channels)
    direction = direction.contiguous()
    if channels > MAX_REGISTER_CHANNELS:
        use = MOMENTS_GRADIENT_DOT.on(blocks.device, channels, "strided", blocks.element_size())
        tiles_per_block = divided(length, use.samples)
        tiles = volumes * tiles_per_block
        programs = min(tiles, use.programs * multiprocessors(blocks.device))
        scratch = blocks.new_empty(programs * rows**2, dtype=torch.float32)
        launch(
            _gradient_dot_kernel, (programs,), blocks, packed, direction, scale, scratch, out, replicas,
            length, tiles_per_block, tiles, *blocks.stride(), *out.stride(),
            CHANNELS=channels, ROWS=rows, LANES=use.samples, SCALED=scale is not None, num_warps=use.warps,
        )  # fmt: skip
        return
    layout = layout_of(blocks) if layout_of(blocks) == layout_of(out) else "strided"
    walk = tiling(MOMENTS_GRADIENT, blocks, layout)
    scratch = blocks.new_empty(walk.programs * (channels**2 + 2 * channels), dtype=torch.float32)
    launch(
        _gradient_kernel, (walk.programs,), blocks, packed, direction, scale, scratch, out, replicas,
        length, walk.tiles_per_block, walk.tiles, *blocks.stride(), *out.stride(),
        CHANNELS=channels, ROWS=rows, LANES=walk.lanes, LAYOUT=layout, MASKED=walk.masked, SCALED=scale is not None,
        num_warps=walk.warps,
    )  # fmt: skip


def _launch_moments(
    blocks: torch.Tensor,
    packed: torch.Tensor | None,
    loss: torch.Tensor | None,
    direction: torch.Tensor | None,
    terms: Terms,
) -> torch.Tensor:
    """Fill what is given and return the programs' packed moments (programs, 1 + C + C²)."""
    _, channels, length = blocks.shape
    layout = layout_of(blocks)
    if layout == "strided" and channels == 16 and blocks.stride(2) == 1:
        layout = "planes"
    walk = tiling(MOMENTS, blocks, layout)
    rows = power_of_two(channels)
    partial = blocks.new_empty((walk.programs, packing.size(channels)), dtype=torch.float64)
    launch(
        _moments_kernel, (walk.programs,),
        blocks, partial, None if packed is None else arrivals(blocks.device), packed, loss, direction,
        length, walk.tiles_per_block, walk.tiles, *blocks.stride(), *terms,
        CHANNELS=channels, ROWS=rows, LANES=walk.lanes, WIDTH=walk.width, LAYOUT=layout, MASKED=walk.masked,
        PARTS=merge_parts(rows, walk.warps), MERGED=packed is not None, LOSS=loss is not None, num_warps=walk.warps,
    )  # fmt: skip
    return partial


def merge_parts(rows: int, warps: int) -> int:
    """How many programs' moments, of `rows`² numbers each, the last program merges at a time."""
    return max(_MERGE_NUMBERS * warps // rows**2, 1)


def _moments_of_many_channels(blocks: torch.Tensor) -> torch.Tensor:
    volumes, channels, length = blocks.shape
    if channels <= MAX_REGISTER_CHANNELS:
        partial = _launch_moments(blocks, None, None, None, Terms())
    else:
        use = MOMENTS_DOT.on(blocks.device, channels, "strided", blocks.element_size())
        tiles_per_block = divided(length, use.samples)
        tiles = volumes * tiles_per_block
        programs = min(tiles, use.programs * multiprocessors(blocks.device))
        partial = blocks.new_empty((programs, packing.size(channels)), dtype=torch.float64)
        launch(
            _moments_dot_kernel, (programs,),
            blocks, partial, length, tiles_per_block, tiles, *blocks.stride(), CHANNELS=channels,
            ROWS=power_of_two(channels), LANES=use.samples, num_warps=use.warps,
        )  # fmt: skip
    merged: torch.Tensor = packing.merge_moments(partial)
    return merged


def _empty_packed(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.new_empty(packing.size(blocks.shape[1]), dtype=torch.float64)

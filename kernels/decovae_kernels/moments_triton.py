"""Channel moments in Triton, for up to 16 channels kept in registers.

Import this module only where Triton is installed. Two launches forward (partial moments, then their merge) and one
backward; `x` is read once by each and its gradient written once.
"""

# mypy: disable-error-code="no-untyped-def"
# (a Triton kernel's arguments are pointers and scalars, which have no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Per-lane second moments live in registers, C² of them a lane: 8192 floats a program are 64 registers a thread.
_REGISTER_FLOATS = 8192
_THREADS = 128
_PROGRAMS_PER_MULTIPROCESSOR = 4
_BACKWARD_TILE_FLOATS = 4096


@triton.jit
def _partial_moments(
    x_ptr, mean_ptr, scatter_ptr, count_ptr,
    length, tiles_per_block, tiles,
    stride_block, stride_channel, stride_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Moments of every num_programs-th tile, relative to the first sample of all, one set a program."""
    program = tl.program_id(0)
    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    is_channel = row < CHANNELS
    channel_ptr = x_ptr + row.to(tl.int64) * stride_channel
    shift = tl.load(channel_ptr, mask=is_channel, other=0.0).to(tl.float32)

    # Welford's update, one running mean and second moment a lane: no reduction inside the loop.
    seen = tl.zeros((LANES,), tl.float32)
    mean = tl.zeros((ROWS, LANES), tl.float32)
    moment = tl.zeros((ROWS, ROWS, LANES), tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        block = (tile // tiles_per_block).to(tl.int64)
        sample = (tile % tiles_per_block) * LANES + lane
        inside = sample < length
        pointers = channel_ptr[:, None] + block * stride_block + sample.to(tl.int64)[None, :] * stride_sample
        value = tl.load(pointers, mask=is_channel[:, None] & inside[None, :], other=0.0).to(tl.float32)
        seen += inside.to(tl.float32)
        share = tl.where(inside, 1.0 / tl.maximum(seen, 1.0), 0.0)
        rest = tl.where(inside, 1.0 - share, 0.0)
        deviation = value - shift[:, None] - mean
        mean += deviation * share[None, :]
        moment += deviation[:, None, :] * (deviation * rest[None, :])[None, :, :]

    # Chan's merge of the lanes. The sum over lanes is in float64: its float32 rounding would be the largest error.
    count = tl.sum(seen)
    centre = tl.sum(mean * seen[None, :], axis=1) / count
    offset = mean - centre[:, None]
    moment += offset[:, None, :] * (offset * seen[None, :])[None, :, :]
    scatter = tl.sum(moment.to(tl.float64), axis=2)

    entry = program * CHANNELS + row
    tl.store(count_ptr + program, count)
    tl.store(mean_ptr + entry, centre, mask=is_channel)
    tl.store(
        scatter_ptr + entry[:, None] * CHANNELS + row[None, :], scatter, mask=is_channel[:, None] & is_channel[None, :]
    )


@triton.jit
def _merge_partials(
    x_ptr, part_mean_ptr, part_scatter_ptr, part_count_ptr, mean_ptr, scatter_ptr,
    parts, count, stride_channel,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Chan's merge of all partial moments in float64; program i writes row i of the scatter."""
    i = tl.program_id(0)
    row = tl.arange(0, ROWS)
    is_channel = row < CHANNELS

    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & is_channel[None, :]
        n = tl.load(part_count_ptr + part, mask=part < parts, other=0.0).to(tl.float64)
        means = tl.load(part_mean_ptr + part[:, None] * CHANNELS + row[None, :], mask=here, other=0.0).to(tl.float64)
        total += tl.sum(means * n[:, None], axis=0)
    centre = total / count

    scatter = tl.zeros((ROWS,), tl.float64)
    centre_i = tl.sum(tl.where(row == i, centre, 0.0))
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        here = (part < parts)[:, None] & is_channel[None, :]
        n = tl.load(part_count_ptr + part, mask=part < parts, other=0.0).to(tl.float64)
        means = tl.load(part_mean_ptr + part[:, None] * CHANNELS + row[None, :], mask=here, other=0.0).to(tl.float64)
        mean_i = tl.load(part_mean_ptr + part * CHANNELS + i, mask=part < parts, other=0.0).to(tl.float64)
        entry = (part * CHANNELS + i)[:, None] * CHANNELS + row[None, :]
        within = tl.load(part_scatter_ptr + entry, mask=here, other=0.0)
        between = (means - centre[None, :]) * ((mean_i - centre_i) * n)[:, None]
        scatter += tl.sum(within + between, axis=0)
    tl.store(scatter_ptr + i * CHANNELS + row, scatter, mask=is_channel)

    shift = tl.load(x_ptr + i.to(tl.int64) * stride_channel).to(tl.float64)
    tl.store(mean_ptr + i, shift + centre_i)


@triton.jit
def _input_gradient(
    x_ptr, mean_ptr, grad_mean_ptr, grad_scatter_ptr, out_ptr,
    length, tiles_per_block, count,
    stride_block, stride_channel, stride_sample,
    out_stride_block, out_stride_channel, out_stride_sample,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One tile of grad_mean / n + (G + Gᵀ)(x − mean)."""
    tile = tl.program_id(0)
    block = (tile // tiles_per_block).to(tl.int64)
    sample = (tile % tiles_per_block) * LANES + tl.arange(0, LANES)
    inside = sample < length
    sample = sample.to(tl.int64)
    row = tl.arange(0, ROWS)
    is_channel = row < CHANNELS

    bias = tl.load(grad_mean_ptr + row, mask=is_channel, other=0.0) / count
    gradient = tl.zeros((ROWS, LANES), tl.float32) + bias.to(tl.float32)[:, None]
    for j in tl.static_range(CHANNELS):
        mean = tl.load(mean_ptr + j)
        high = mean.to(tl.float32)
        low = (mean - high.to(tl.float64)).to(tl.float32)
        pointers = x_ptr + block * stride_block + j * stride_channel + sample * stride_sample
        centred = (tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - high) - low
        above = tl.load(grad_scatter_ptr + row * CHANNELS + j, mask=is_channel, other=0.0)
        below = tl.load(grad_scatter_ptr + j * CHANNELS + row, mask=is_channel, other=0.0)
        gradient += (above + below).to(tl.float32)[:, None] * centred[None, :]

    pointers = out_ptr + block * out_stride_block + row.to(tl.int64)[:, None] * out_stride_channel
    pointers += sample[None, :] * out_stride_sample
    tl.store(pointers, gradient.to(out_ptr.dtype.element_ty), mask=is_channel[:, None] & inside[None, :])


def moments(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and scatter (C, C), float64, of `blocks` (B, C, L), float16, bfloat16 or float32, 1 ≤ C ≤ 16."""
    count, channels, length = blocks.shape
    rows = triton.next_power_of_2(channels)
    lanes = min(_REGISTER_FLOATS // rows**2, 4 * _THREADS, triton.next_power_of_2(length))
    tiles_per_block = triton.cdiv(length, lanes)
    tiles = count * tiles_per_block
    programs = min(tiles, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(blocks.device))

    part_mean = blocks.new_empty((programs, channels), dtype=torch.float32)
    part_scatter = blocks.new_empty((programs, channels, channels), dtype=torch.float64)
    part_count = blocks.new_empty((programs,), dtype=torch.float32)
    mean = blocks.new_empty((channels,), dtype=torch.float64)
    scatter = blocks.new_empty((channels, channels), dtype=torch.float64)
    with torch.cuda.device_of(blocks):
        _partial_moments[(programs,)](
            blocks, part_mean, part_scatter, part_count,
            length, tiles_per_block, tiles, *blocks.stride(),
            CHANNELS=channels, ROWS=rows, LANES=lanes, num_warps=_THREADS // 32,
        )  # fmt: skip
        _merge_partials[(channels,)](
            blocks, part_mean, part_scatter, part_count, mean, scatter,
            programs, count * length, blocks.stride(1),
            CHANNELS=channels, ROWS=rows, PARTS=64, num_warps=_THREADS // 32,
        )  # fmt: skip
    return mean, scatter


def input_gradient(
    blocks: torch.Tensor, mean: torch.Tensor, grad_mean: torch.Tensor, grad_scatter: torch.Tensor, *, out: torch.Tensor
) -> None:
    """Write the gradient with respect to `blocks` (B, C, L) into `out`, of the same shape and dtype."""
    count, channels, length = blocks.shape
    rows = triton.next_power_of_2(channels)
    lanes = min(_BACKWARD_TILE_FLOATS // rows, 8 * _THREADS, triton.next_power_of_2(length))
    tiles_per_block = triton.cdiv(length, lanes)
    with torch.cuda.device_of(blocks):
        _input_gradient[(count * tiles_per_block,)](
            blocks, mean, grad_mean.contiguous(), grad_scatter.contiguous(), out,
            length, tiles_per_block, count * length, *blocks.stride(), *out.stride(),
            CHANNELS=channels, ROWS=rows, LANES=lanes, num_warps=_THREADS // 32,
        )  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2  # the interpreter runs one program after another; a few exercise the merge

"""What the Triton kernels share: reading and writing tiles of samples channel by channel, without a copy.

A tile is LANES consecutive samples. Up to 16 channels it is held as a tuple of C vectors, so that every operation is
elementwise in one layout: loads are 16 bytes wide, and nothing passes through shared memory but the last reduction.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# (a Triton kernel's arguments are pointers and scalars, which have no Python types, and its tuples grow)

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from decovae_kernels.configurations import Kernel, Streaming


@triton.jit
def _take_apart(run, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """A run (LANES · C,) of samples with their channels side by side, as a tuple of C vectors; C a power of two."""
    # The lowest bit of the index within the run, and so of the channel, splits off first.
    parts = (run,)
    for _ in tl.static_range(4):
        if len(parts) < CHANNELS:
            even = ()
            odd = ()
            for i in tl.static_range(len(parts)):
                low, high = tl.split(tl.reshape(parts[i], (LANES * CHANNELS // (2 * len(parts)), 2)))
                even = even + (low,)
                odd = odd + (high,)
            parts = even + odd
    return parts


@triton.jit
def _put_together(parts, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """The opposite of `_take_apart`."""
    for _ in tl.static_range(4):
        if len(parts) > 1:
            merged = ()
            for i in tl.static_range(len(parts) // 2):
                pair = tl.join(parts[i], parts[i + len(parts) // 2])
                merged = merged + (tl.reshape(pair, (2 * LANES * CHANNELS // len(parts),)),)
            parts = merged
    return parts[0]


@triton.jit
def load_channels(
    ptr, block, tile, inside, stride_block, stride_channel, stride_sample,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The channels of one tile as a tuple of C float32 vectors (LANES,); zero where `inside` is false."""
    base = ptr + block.to(tl.int64) * stride_block
    first = tile.to(tl.int64) * LANES
    if LAYOUT == "interleaved":
        pointers = base + first * CHANNELS + tl.arange(0, LANES * CHANNELS)
        if MASKED:
            valid = tl.reshape(tl.broadcast_to(inside[:, None], (LANES, CHANNELS)), (LANES * CHANNELS,))
            run = tl.load(pointers, mask=valid, other=0.0)
        else:
            run = tl.load(pointers)
        parts = _take_apart(run, CHANNELS, LANES)
    elif LAYOUT == "planes":
        sample = first + tl.arange(0, LANES)
        pointers = (
            base + tl.arange(0, CHANNELS).to(tl.int64)[:, None] * stride_channel + sample[None, :] * stride_sample
        )
        if MASKED:
            plane = tl.load(pointers, mask=tl.broadcast_to(inside[None, :], (CHANNELS, LANES)), other=0.0)
        else:
            plane = tl.load(pointers)
        parts = _take_apart(tl.reshape(tl.trans(plane), (LANES * CHANNELS,)), CHANNELS, LANES)
    else:
        sample = first + tl.arange(0, LANES)
        parts = ()
        for i in tl.static_range(CHANNELS):
            pointers = base + tl.full((), i, tl.int64) * stride_channel + sample * stride_sample
            if MASKED:
                parts = parts + (tl.load(pointers, mask=inside, other=0.0),)
            else:
                parts = parts + (tl.load(pointers),)
    channels = ()
    for i in tl.static_range(CHANNELS):
        channels = channels + (parts[i].to(tl.float32),)
    return channels


@triton.jit
def store_channels(
    ptr, channels, block, tile, inside, stride_block, stride_channel, stride_sample,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, LAYOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write what `load_channels` would read, rounded to the dtype of `ptr`."""
    base = ptr + block.to(tl.int64) * stride_block
    first = tile.to(tl.int64) * LANES
    parts = ()
    for i in tl.static_range(CHANNELS):
        parts = parts + (channels[i].to(ptr.dtype.element_ty),)
    if LAYOUT == "interleaved":
        pointers = base + first * CHANNELS + tl.arange(0, LANES * CHANNELS)
        run = _put_together(parts, CHANNELS, LANES)
        if MASKED:
            valid = tl.reshape(tl.broadcast_to(inside[:, None], (LANES, CHANNELS)), (LANES * CHANNELS,))
            tl.store(pointers, run, mask=valid)
        else:
            tl.store(pointers, run)
    elif LAYOUT == "planes":
        sample = first + tl.arange(0, LANES)
        pointers = (
            base + tl.arange(0, CHANNELS).to(tl.int64)[:, None] * stride_channel + sample[None, :] * stride_sample
        )
        plane = tl.trans(tl.reshape(_put_together(parts, CHANNELS, LANES), (LANES, CHANNELS)))
        if MASKED:
            tl.store(pointers, plane, mask=tl.broadcast_to(inside[None, :], (CHANNELS, LANES)))
        else:
            tl.store(pointers, plane)
    else:
        sample = first + tl.arange(0, LANES)
        for i in tl.static_range(CHANNELS):
            pointers = base + tl.full((), i, tl.int64) * stride_channel + sample * stride_sample
            if MASKED:
                tl.store(pointers, parts[i], mask=inside)
            else:
                tl.store(pointers, parts[i])


def layout_of(blocks: torch.Tensor) -> str:
    """How the kernels read `blocks` (B, C, L): "interleaved" where the channels of a sample lie side by side."""
    channels = blocks.shape[1]
    beside = channels in (2, 4, 8, 16) and blocks.stride()[1:] == (1, channels)
    return "interleaved" if beside else "strided"


def neighbours(blocks: torch.Tensor, layout: str) -> int:
    """Samples of one channel that 16 bytes hold; of all channels where they are interleaved, but at least one."""
    held = 16 // blocks.element_size()
    return max(held // blocks.shape[1], 1) if layout == "interleaved" else held


# Triton's own functions for these also work in kernels, and cost a launch microseconds on the host.
def divided(number: int, size: int) -> int:
    """How many pieces of that size hold the number."""
    return -(-number // size)


def power_of_two(number: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << (int(number) - 1).bit_length()


class Tiling(NamedTuple):
    """How `Streaming` walks blocks (B, C, L): samples a tile (`lanes`) and a thread takes at once, tiles, programs."""

    warps: int
    width: int
    lanes: int
    tiles_per_block: int
    tiles: int
    programs: int
    masked: bool


def tiling(kernel: Kernel[Streaming], blocks: torch.Tensor, layout: str) -> Tiling:
    """Tiles of `blocks`, read in that layout, as the configuration of `kernel` has them."""
    volumes, channels, length = blocks.shape
    use = kernel.on(blocks.device, channels, layout, blocks.element_size())
    width = min(neighbours(blocks, layout), use.width)
    lanes = use.vectors * width * 32 * use.warps
    tiles_per_block = divided(length, lanes)
    tiles = volumes * tiles_per_block
    programs = min(tiles, use.programs * multiprocessors(blocks.device))
    return Tiling(use.warps, width, lanes, tiles_per_block, tiles, programs, length % lanes > 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; on the CPU, where programs run one after another, a few exercise the merge."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


_ARRIVALS: dict[tuple[torch.device, int], torch.Tensor] = {}


def arrivals(device: torch.device) -> torch.Tensor:
    """A counter of programs that have finished, zero between launches: the last program resets it.

    One a device and stream, since launches on one stream do not overlap. A launch that is captured in a CUDA graph gets
    its own, zeroed in the graph, because its replays may run beside anything.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _ARRIVALS:
        _ARRIVALS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _ARRIVALS[key]

"""The factorised upsampling convolution in Triton: what lies on either side of the products at low resolution.

Forward, a product x → (m_k) over the 27 taps k, then `_gather_kernel`: y = Σ_k shift_k(U m_k) + bias.
Backward, `_spread_kernel`: G_k = Uᵀ shift_kᵀ dy, then the products dx = Σ_k W_kᵀ G_k and dW_k = G_k xᵀ.

All tensors are channels-last. The products, 27/8 as large as the output, exist for a few planes of depth at a time.
Import this module only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc"
# (a Triton kernel's arguments are pointers and scalars, which have no Python types, and its tuples grow)

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from decovae_kernels._launch import launch
from decovae_kernels.configurations import DOWNSAMPLE, GATHER, SLAB, SPREAD, UPSAMPLE, Kernel, Voxels
from decovae_kernels.tiles import divided, power_of_two

# A grid's third axis has 65535 programs at most, and the backward needs 3 a volume.
_MAX_VOLUMES = 1 << 14

# Along an axis, out[2i] and out[2i+1] take 7 terms: taps −, 0, + of neighbours (−1, 0), (−1, 0, +1), (0, +1). Their
# weights in quarters, two bits a term.
_EVEN = tl.constexpr(0b01_11_00_11_01_01_11)
_ODD = tl.constexpr(0b11_01_01_11_00_11_01)


@triton.jit
def _tile(first, planes, height, width, TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Coordinates d, h, w (V,) of the program's low-resolution voxels, made valid, and which of them were."""
    tile = tl.program_id(0)
    across = tl.cdiv(width, TILE_W)
    down = tl.cdiv(height, TILE_H)
    lane = tl.arange(0, TILE_D * TILE_H * TILE_W)
    w = (tile % across) * TILE_W + lane % TILE_W
    h = (tile // across % down) * TILE_H + lane // TILE_W % TILE_H
    d = (tile // across // down) * TILE_D + lane // (TILE_W * TILE_H)
    inside = (d < planes) & (h < height) & (w < width)
    return first + tl.minimum(d, planes - 1), tl.minimum(h, height - 1), tl.minimum(w, width - 1), inside


@triton.jit
def _term(step, place, size):
    """Of term `step` (0 … 6) along an axis: its tap, the index it reads, and its weights in both phases."""
    step = tl.zeros(place.shape, tl.int32) + step
    tap = (step + 1) // 3
    at = tl.minimum(tl.maximum(place + (step - 2 * tap - 1), 0), size - 1)
    even = ((tl.full(place.shape, _EVEN, tl.int32) >> (2 * step)) & 3).to(tl.float32) * 0.25
    odd = ((tl.full(place.shape, _ODD, tl.int32) >> (2 * step)) & 3).to(tl.float32) * 0.25
    # The convolution's zeros beyond the ends.
    even = tl.where((tap == 0) & (place == 0), 0.0, even)
    odd = tl.where((tap == 2) & (place == size - 1), 0.0, odd)
    return tap, at, even[:, None], odd[:, None]


@triton.jit
def _load(pointers, channel, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """What the pointers name, as float32; channels beyond the last, which only some shapes have, are zero."""
    if CHANNELS % BLOCK == 0:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=tl.broadcast_to(channel < CHANNELS, pointers.shape), other=0.0)
    return values.to(tl.float32)


@triton.jit
def _add_phases(sums, terms, even, odd):
    """Add a term of the next axis, one for each phase of the axes before it, to both phases of this one."""
    added = ()
    for phase in tl.static_range(2 * len(terms)):
        weight = even if phase < len(terms) else odd
        added = added + (sums[phase] + weight * terms[phase % len(terms)],)
    return added


@triton.jit
def _store_phases(
    out_ptr, sums, volume, channel, d, h, w, inside, depth, height, width, CHANNELS: tl.constexpr
):  # fmt: skip
    """The 8 high-resolution voxels of every low-resolution one."""
    written = inside[:, None] & (channel < CHANNELS)
    for phase in tl.static_range(8):
        plane = (volume * 2 * depth + 2 * d + phase // 4) * 2 * height + 2 * h + phase // 2 % 2
        voxel = plane * 2 * width + 2 * w + phase % 2
        value = sums[phase].to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (voxel * CHANNELS)[:, None] + channel, value, mask=written)


@triton.jit
def _gather_kernel(
    products_ptr, bias_ptr, out_ptr, first, planes, depth, height, width, slots,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Planes [2·first, 2·(first + planes)) of the output; plane d of the products lies in slot d mod `slots`."""
    V: tl.constexpr = TILE_D * TILE_H * TILE_W
    ROW: tl.constexpr = 27 * CHANNELS
    volume = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    d, h, w, inside = _tile(first, planes, height, width, TILE_D, TILE_H, TILE_W)
    here = (w.to(tl.int64) * ROW)[:, None] + channel
    before = (tl.maximum(w - 1, 0).to(tl.int64) * ROW)[:, None] + channel
    after = (tl.minimum(w + 1, width - 1).to(tl.int64) * ROW)[:, None] + channel
    # The convolution's zeros beyond the ends.
    low_even_before = tl.where(w == 0, 0.0, 0.75)[:, None]
    low_even = tl.where(w == 0, 0.0, 0.25)[:, None]
    high_odd = tl.where(w == width - 1, 0.0, 0.25)[:, None]
    high_odd_after = tl.where(w == width - 1, 0.0, 0.75)[:, None]
    zero = tl.zeros((V, BLOCK), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    for step_d in range(7):
        tap_d, at_d, even_d, odd_d = _term(step_d, d, depth)
        plane = (volume * slots + at_d % slots) * height
        flat = (zero, zero, zero, zero)
        for step_h in range(7):
            tap_h, at_h, even_h, odd_h = _term(step_h, h, height)
            row_ptr = products_ptr + ((plane + at_h) * width * ROW + (tap_d * 9 + tap_h * 3) * CHANNELS)[:, None]
            low_before = _load(row_ptr + before, channel, CHANNELS, BLOCK)
            low = _load(row_ptr + here, channel, CHANNELS, BLOCK)
            even = low_even_before * low_before + low_even * low
            odd = 0.25 * low_before + 0.75 * low
            mid_before = _load(row_ptr + before + CHANNELS, channel, CHANNELS, BLOCK)
            mid = _load(row_ptr + here + CHANNELS, channel, CHANNELS, BLOCK)
            mid_after = _load(row_ptr + after + CHANNELS, channel, CHANNELS, BLOCK)
            even = 0.75 * mid + (0.25 * mid_before + even)
            odd = 0.25 * mid_after + (0.75 * mid + odd)
            high = _load(row_ptr + here + 2 * CHANNELS, channel, CHANNELS, BLOCK)
            high_after = _load(row_ptr + after + 2 * CHANNELS, channel, CHANNELS, BLOCK)
            even = 0.25 * high_after + (0.75 * high + even)
            odd = high_odd_after * high_after + (high_odd * high + odd)
            flat = _add_phases(flat, (even, odd), even_h, odd_h)
        sums = _add_phases(sums, flat, even_d, odd_d)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        shifted = ()
        for phase in tl.static_range(8):
            shifted = shifted + (sums[phase] + bias,)
        sums = shifted
    _store_phases(out_ptr, sums, volume, channel, d, h, w, inside, depth, height, width, CHANNELS)


@triton.jit
def _pull(place, size, offset, step):
    """Weight (V, 1) of dy[2·place + offset] in Uᵀ of what the tap saw; the tap moves it to `step` = 0 … 3 of Uᵀ.

    Uᵀ sums ¼, ¾, ¾, ¼ over 2i−1 … 2i+2; what an end lacks falls to its neighbour, since interpolation clamps.
    """
    step = tl.zeros(place.shape, tl.int32) + step
    opens = place == 0
    closes = place == size - 1
    outer = (step == 0) | (step == 3)
    weight = tl.where(outer, 0.25, 0.75)
    weight = tl.where(((step == 1) & opens) | ((step == 2) & closes), 1.0, weight)
    gone = ((step == 0) & opens) | ((step == 3) & closes) | (step < 0) | (step > 3)
    # The convolution read zeros beyond the ends.
    index = 2 * place + offset
    return tl.where(gone | (index < 0) | (index >= 2 * size), 0.0, weight)[:, None]


@triton.jit
def _spread_kernel(
    grad_ptr, pulled_ptr, first, planes, depth, height, width,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """G_k (volumes, planes, H, W, 27, C) of the planes from `first`; a program computes the 9 taps of one t_d."""
    V: tl.constexpr = TILE_D * TILE_H * TILE_W
    volume = (tl.program_id(2) // 3).to(tl.int64)
    tap_d = tl.program_id(2) % 3
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    d, h, w, inside = _tile(first, planes, height, width, TILE_D, TILE_H, TILE_W)

    weights = ()
    starts = ()
    for step in tl.static_range(4):
        offset = step - tap_d
        at = tl.minimum(tl.maximum(2 * d + offset, 0), 2 * depth - 1)
        weights = weights + (_pull(d, depth, offset, step),)
        starts = starts + ((volume * 2 * depth + at) * 2 * height,)
    across = ()
    for step in tl.static_range(4):
        across = across + (_pull(w, width, step - 1, step),)
    opens = tl.where(w == 0, 0.0, 1.0)[:, None]
    closes = tl.where(w == width - 1, 0.0, 1.0)[:, None]
    zero = tl.zeros((V, BLOCK), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    for row in range(6):
        at_h = tl.minimum(tl.maximum(2 * h - 2 + row, 0), 2 * height - 1)
        taps = (zero, zero, zero)
        for column in tl.static_range(6):
            at_w = tl.minimum(tl.maximum(2 * w - 2 + column, 0), 2 * width - 1)
            value = zero
            for step in tl.static_range(4):
                voxel = (starts[step] + at_h) * 2 * width + at_w
                dy = _load(grad_ptr + (voxel * CHANNELS)[:, None] + channel, channel, CHANNELS, BLOCK)
                value += weights[step] * dy
            if column < 2:
                value *= opens
            if column > 3:
                value *= closes
            along = ()
            for tap in tl.static_range(3):
                if column + tap >= 2 and column + tap <= 5:
                    along = along + (taps[tap] + across[column - 2 + tap] * value,)
                else:
                    along = along + (taps[tap],)
            taps = along
        down = ()
        for tap in tl.static_range(3):
            weight = _pull(h, height, row - 2, row - 2 + tap)
            down = down + (sums[3 * tap] + weight * taps[0],)
            down = down + (sums[3 * tap + 1] + weight * taps[1],)
            down = down + (sums[3 * tap + 2] + weight * taps[2],)
        sums = down

    written = inside[:, None] & (channel < CHANNELS)
    voxel = ((volume * planes + (d - first)) * height + h) * width + w
    for tap in tl.static_range(9):
        place = (voxel * 27 + tap_d * 9 + tap) * CHANNELS
        tl.store(pulled_ptr + place[:, None] + channel, sums[tap].to(pulled_ptr.dtype.element_ty), mask=written)


@triton.jit
def _upsample_kernel(
    x_ptr, out_ptr, first, planes, depth, height, width,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """U x of all planes, (volumes, 2D, 2H, 2W, C)."""
    V: tl.constexpr = TILE_D * TILE_H * TILE_W
    volume = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    d, h, w, inside = _tile(first, planes, height, width, TILE_D, TILE_H, TILE_W)
    before = (tl.maximum(w - 1, 0) * CHANNELS)[:, None] + channel
    here = (w * CHANNELS)[:, None] + channel
    after = (tl.minimum(w + 1, width - 1) * CHANNELS)[:, None] + channel
    zero = tl.zeros((V, BLOCK), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    for step_d in range(3):
        # The tap in the middle is plain interpolation.
        _, at_d, even_d, odd_d = _term(step_d + 2, d, depth)
        flat = (zero, zero, zero, zero)
        for step_h in range(3):
            _, at_h, even_h, odd_h = _term(step_h + 2, h, height)
            row_ptr = x_ptr + (((volume * depth + at_d) * height + at_h) * width * CHANNELS)[:, None]
            middle = 0.75 * _load(row_ptr + here, channel, CHANNELS, BLOCK)
            even = 0.25 * _load(row_ptr + before, channel, CHANNELS, BLOCK) + middle
            odd = 0.25 * _load(row_ptr + after, channel, CHANNELS, BLOCK) + middle
            flat = _add_phases(flat, (even, odd), even_h, odd_h)
        sums = _add_phases(sums, flat, even_d, odd_d)
    _store_phases(out_ptr, sums, volume, channel, d, h, w, inside, depth, height, width, CHANNELS)


@triton.jit
def _downsample_kernel(
    grad_ptr, out_ptr, first, planes, depth, height, width,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, TILE_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Uᵀ of all planes, (volumes, D, H, W, C)."""
    V: tl.constexpr = TILE_D * TILE_H * TILE_W
    volume = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    d, h, w, inside = _tile(first, planes, height, width, TILE_D, TILE_H, TILE_W)
    across = ()
    for step_w in tl.static_range(4):
        across = across + (_pull(w, width, step_w - 1, step_w),)
    total = tl.zeros((V, BLOCK), tl.float32)
    for step_d in range(4):
        at_d = tl.minimum(tl.maximum(2 * d - 1 + step_d, 0), 2 * depth - 1)
        plane = tl.zeros((V, BLOCK), tl.float32)
        for step_h in range(4):
            at_h = tl.minimum(tl.maximum(2 * h - 1 + step_h, 0), 2 * height - 1)
            row = tl.zeros((V, BLOCK), tl.float32)
            for step_w in tl.static_range(4):
                at_w = tl.minimum(tl.maximum(2 * w - 1 + step_w, 0), 2 * width - 1)
                voxel = ((volume * 2 * depth + at_d) * 2 * height + at_h) * 2 * width + at_w
                dy = _load(grad_ptr + (voxel * CHANNELS)[:, None] + channel, channel, CHANNELS, BLOCK)
                row += across[step_w] * dy
            plane += _pull(h, height, step_h - 1, step_h) * row
        total += _pull(d, depth, step_d - 1, step_d) * plane
    voxel = ((volume * depth + d) * height + h) * width + w
    written = inside[:, None] & (channel < CHANNELS)
    tl.store(out_ptr + (voxel * CHANNELS)[:, None] + channel, total.to(out_ptr.dtype.element_ty), mask=written)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slab_bytes: int) -> torch.Tensor:
    """Σ_k shift_k(U(W_k x)) + bias, (N, C_out, 2D, 2H, 2W) in x's dtype, channels-last in memory.

    Args:
        x: (N, C_in, D, H, W), float16, bfloat16 or float32, any strides; one copy where not channels-last.
        weight: (C_out, C_in, 3, 3, 3) in x's dtype.
        bias: (C_out,) in any floating dtype, or None.
        slab_bytes: bounds the products, as far as three planes of depth do.
    """
    voxels = x.movedim(1, -1).contiguous()
    volumes, depth, height, width, _ = voxels.shape
    channels = weight.shape[0]
    mixing = _mixing(weight)
    out = x.new_empty(volumes, 2 * depth, 2 * height, 2 * width, channels)
    group, slots = _slab(voxels, channels, 3, slab_bytes)
    products = x.new_empty(group * slots * height * width, 27 * channels)
    plane = height * width
    for n in range(0, volumes, group):
        rows = voxels[n : n + group].flatten(0, 3)
        ready = done = 0
        while done < depth:
            # Of the planes at hand, one before the first that is still to be written stays.
            until = min(depth, max(done - 1, 0) + slots)
            if slots == depth:
                torch.mm(rows, mixing, out=products[: rows.shape[0]])
            else:
                for start, end in _around(ready, until, slots):
                    slot = start % slots
                    torch.mm(
                        rows[start * plane : end * plane],
                        mixing,
                        out=products[slot * plane : (slot + end - start) * plane],
                    )
            ready = until
            last = depth if ready == depth else ready - 1
            gather(products, bias, out[n : n + group], done, last - done, slots)
            done = last
    return out.movedim(-1, 1)


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, slab_bytes: int, needs: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to `x`, in its dtype and channels-last in memory, and to `weight`, in float32.

    Arguments as for `forward`; `needs` says which of the two are computed, the other is None.
    """
    voxels = x.movedim(1, -1).contiguous()
    upstream = grad.movedim(1, -1).contiguous()
    volumes, depth, height, width, _ = voxels.shape
    channels = weight.shape[0]
    mixing = _mixing(weight)
    grad_x = torch.empty_like(voxels) if needs[0] else None
    grad_mixing = torch.zeros_like(mixing, dtype=torch.float32) if needs[1] else None
    group, count = _slab(voxels, channels, 1, slab_bytes)
    plane = height * width
    pulled = x.new_empty(group * count * plane, 27 * channels)
    for n in range(0, volumes, group):
        some = min(group, volumes - n)
        for first in range(0, depth, count):
            planes = min(count, depth - first)
            spread(upstream[n : n + some], pulled, first, planes)
            gradients = pulled[: some * planes * plane]
            # Several volumes at once are whole ones, so their planes follow each other.
            here = slice(n, n + some), slice(first, first + planes)
            if grad_x is not None:
                torch.mm(gradients, mixing.T, out=grad_x[here].view(-1, grad_x.shape[-1]))
            if grad_mixing is not None:
                grad_mixing += torch.mm(voxels[here].view(-1, voxels.shape[-1]).T, gradients)
    return (
        None if grad_x is None else grad_x.movedim(-1, 1),
        None if grad_mixing is None else grad_mixing.view(-1, 3, 3, 3, channels).permute(4, 0, 1, 2, 3).contiguous(),
    )


def gather(
    products: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, first: int, planes: int, slots: int
) -> None:
    """Write planes [2·first, 2·(first + planes)) of `out` (N, 2D, 2H, 2W, C) from the products of their neighbours.

    Args:
        products: (N·slots·H·W, 27·C); plane d of a volume lies in its slot d mod `slots`.
        bias: (C,) or None.
    """
    spatial = [size // 2 for size in out.shape[1:4]]
    _launch(GATHER, _gather_kernel, products, (bias, out, first, planes, *spatial, slots), out.shape, planes)


def spread(grad: torch.Tensor, pulled: torch.Tensor, first: int, planes: int) -> None:
    """Write G_k of `planes` planes from the `first` to the first rows of `pulled` (…, 27·C).

    `grad` is (N, 2D, 2H, 2W, C), `pulled` filled as (N, planes, H, W, 27, C).
    """
    spatial = [size // 2 for size in grad.shape[1:4]]
    _launch(SPREAD, _spread_kernel, grad, (pulled, first, planes, *spatial), grad.shape, planes, programs=3)


def slab_bytes(x: torch.Tensor) -> int:
    """Bytes of the products of a tensor like `x` that may be alive at once."""
    return SLAB.on(x.device, x.shape[1], "channels_last", x.element_size()).bytes


def upsample(x: torch.Tensor) -> torch.Tensor:
    """U x, (N, C, 2D, 2H, 2W), channels-last in memory; arguments as for `forward`."""
    voxels = x.movedim(1, -1).contiguous()
    volumes, *spatial, channels = voxels.shape
    out = x.new_empty(volumes, *(2 * size for size in spatial), channels)
    _launch(UPSAMPLE, _upsample_kernel, voxels, (out, 0, spatial[0], *spatial), out.shape, spatial[0])
    return out.movedim(-1, 1)


def downsample(grad: torch.Tensor) -> torch.Tensor:
    """Uᵀ of `grad` (N, C, 2D, 2H, 2W), channels-last in memory: the gradient of `upsample`, of the same bits always."""
    upstream = grad.movedim(1, -1).contiguous()
    volumes, *doubled, channels = upstream.shape
    spatial = [size // 2 for size in doubled]
    out = grad.new_empty(volumes, *spatial, channels)
    _launch(DOWNSAMPLE, _downsample_kernel, upstream, (out, 0, spatial[0], *spatial), upstream.shape, spatial[0])
    return out.movedim(-1, 1)


def _mixing(weight: torch.Tensor) -> torch.Tensor:
    """The matrices of all taps side by side, (C_in, 27·C_out)."""
    return weight.permute(1, 2, 3, 4, 0).reshape(weight.shape[1], -1)


def _slab(voxels: torch.Tensor, channels: int, fewest: int, slab_bytes: int) -> tuple[int, int]:
    """Volumes and planes of each whose products fit the slab: whole volumes, or at least `fewest` planes of one."""
    volumes, depth, height, width, _ = voxels.shape
    planes = slab_bytes // max(27 * channels * height * width * voxels.element_size(), 1)
    if planes < depth:
        return 1, min(max(planes, fewest), depth)
    return min(planes // depth, volumes, _MAX_VOLUMES), depth


def _around(start: int, end: int, slots: int) -> Iterator[tuple[int, int]]:
    """[start, end) in pieces that do not wrap around the slots."""
    while start < end:
        stop = min(end, (start // slots + 1) * slots)
        yield start, stop
        start = stop


def _launch(
    which: Kernel[Voxels],
    kernel: object,
    source: torch.Tensor,
    others: tuple[object, ...],
    high: torch.Size,
    planes: int,
    programs: int = 1,
) -> None:
    """A program a tile of voxels of `planes` low-resolution planes and a block of channels.

    `high` is the shape (N, 2D, 2H, 2W, C) of the large tensor; a volume has `programs` of them for every tile.
    """
    volumes, _, height, width, channels = high
    element = source.element_size()
    use = which.on(source.device, channels, "channels_last", element)
    block = min(power_of_two(channels), use.channel_bytes // element)
    # An odd number of channels leaves every other voxel's at odd addresses.
    wide = min(16 // element, channels & -channels)
    voxels = max(32 * use.warps * wide * use.vectors // block, 1)
    bits = voxels.bit_length() - 1
    tile = 1 << bits // 3, 1 << (bits + 1) // 3, 1 << (bits + 2) // 3
    tiles = divided(planes, tile[0]) * divided(height // 2, tile[1]) * divided(width // 2, tile[2])
    launch(
        kernel, (tiles, divided(channels, block), programs * volumes), source, *others,
        CHANNELS=channels, BLOCK=block, TILE_D=tile[0], TILE_H=tile[1], TILE_W=tile[2], num_warps=use.warps,
    )  # fmt: skip

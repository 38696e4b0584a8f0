"""The factorised upsampling convolution in plain torch: products at low resolution, then one axis after another.

With taps m₋, m₀, m₊ along an axis, and weights scaled by 4 so that interpolation counts in whole numbers,

    out[2i]   = 3m₋[i−1] + m₀[i−1] + m₋[i] + 3m₀[i] + 3m₊[i] + m₊[i+1]
    out[2i+1] = m₋[i−1] + 3m₋[i] + 3m₀[i] + m₊[i] + m₀[i+1] + 3m₊[i+1]

At the first i nothing lies before: m₋ is missing from out[0] (the convolution's zero), and elsewhere index −1 means 0
(interpolation clamps); likewise at the last. Channels are innermost, so every sum runs over long contiguous rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from decovae_kernels._dispatch import without_memory

# Bytes of the products that are alive at once: beyond the caches, sums over them wait for memory.
_SLAB_BYTES = 1 << 23


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slab_bytes: int) -> torch.Tensor:
    """Σ_k shift_k(U(W_k x)) + bias, (N, C_out, 2D, 2H, 2W) in x's dtype, channels-last in memory.

    Args:
        x: (N, C_in, D, H, W), any strides.
        weight: (C_out, C_in, 3, 3, 3) in x's dtype.
        bias: (C_out,) or None.
        slab_bytes: bounds the products, as far as one plane of depth does.
    """
    volumes, _, *spatial = x.shape
    out_channels = weight.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mixing = _mixing(weight.to(dtype))
    doubled = [2 * size for size in spatial]
    out = x.new_empty(volumes, *doubled, out_channels)
    count = _group(x, out_channels, slab_bytes)
    groups = [slice(c, min(c + count, out_channels)) for c in range(0, out_channels, count)]
    for n, (start, end), (first, last) in _slabs(x, count, slab_bytes):
        rows = _rows(x, n, first, last).to(dtype)
        for group in groups:
            products = torch.matmul(rows, mixing[:, :, group]).view(3, 3, 3, last - first, *spatial[1:], -1)
            deep = _gather(products.unbind(0), -4)[:, :, 2 * (start - first) : 2 * (end - first)]
            y = _gather(_gather(deep.unbind(0), -3).unbind(0), -2)
            if bias is not None:
                y += bias[group].to(dtype)
            out[n, 2 * start : 2 * end, :, :, group] = y
    return out.movedim(-1, 1)


def backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, slab_bytes: int, needs: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients with respect to `x`, in its dtype and channels-last in memory, and to `weight`, at least float32.

    From one G_k = Uᵀ shift_kᵀ dy at low resolution: dx = Σ_k W_kᵀ G_k, dW_k = G_k xᵀ. Arguments as for `forward`;
    `needs` says which of the two are computed, the other is None.
    """
    volumes, in_channels, *spatial = x.shape
    out_channels = weight.shape[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mixing = _mixing(weight.to(dtype))
    grad_mixing = torch.zeros_like(mixing) if needs[1] else None
    grad_x = x.new_empty(volumes, *spatial, in_channels) if needs[0] else None
    count = _group(x, out_channels, slab_bytes)
    groups = [slice(c, min(c + count, out_channels)) for c in range(0, out_channels, count)]
    for n, (start, end), (first, last) in _slabs(x, count, slab_bytes):
        rows = _rows(x, n, start, end).to(dtype)
        grad_rows = torch.zeros_like(rows)
        for group in groups:
            dy = grad[n, group, 2 * first : 2 * last].movedim(0, -1).to(dtype).contiguous()
            spread = _spread(_spread(_spread(dy, -2), -3), -4)[:, :, :, start - first : end - first]
            pulled = spread.reshape(27, -1, dy.shape[-1])
            if grad_mixing is not None:
                grad_mixing[:, :, group] += torch.matmul(rows.T, pulled)
            if grad_x is not None:
                for k in range(27):
                    grad_rows.addmm_(pulled[k], mixing[k, :, group].T)
        if grad_x is not None:
            grad_x[n, start:end] = grad_rows.view(end - start, *spatial[1:], in_channels)
    if grad_mixing is not None:
        grad_mixing = (grad_mixing / 64).view(3, 3, 3, in_channels, out_channels).permute(4, 3, 0, 1, 2)
    return None if grad_x is None else grad_x.movedim(-1, 1), grad_mixing


def slab_bytes(x: torch.Tensor) -> int:
    """Bytes of the products that may be alive at once."""
    return _SLAB_BYTES


def upsample(x: torch.Tensor) -> torch.Tensor:
    """U x, (N, C, 2D, 2H, 2W)."""
    return torch.nn.functional.interpolate(x, scale_factor=2, mode="trilinear")


def downsample(grad: torch.Tensor) -> torch.Tensor:
    """Uᵀ of `grad` (N, C, 2D, 2H, 2W): the gradient of `upsample`, of the same bits always."""
    doubled = list(grad.shape[2:])
    size = [*grad.shape[:2], *(length // 2 for length in doubled)]
    if without_memory(grad):
        return grad.new_empty(size)  # torch's shape function refuses symbolic sizes
    if grad.device.type == "cpu":
        found: torch.Tensor = torch.ops.aten.upsample_trilinear3d_backward(grad, doubled, size, False, 2.0, 2.0, 2.0)
        return found
    # torch's own adds atomically on GPUs.
    return _halved(_halved(_halved(grad.to(torch.promote_types(grad.dtype, torch.float32)), 2), 3), 4).to(grad.dtype)


def _mixing(weight: torch.Tensor) -> torch.Tensor:
    """A matrix (C_in, C_out) for every tap, scaled by ¼ an axis: (27, C_in, C_out)."""
    return (weight / 64).permute(2, 3, 4, 1, 0).reshape(27, weight.shape[1], weight.shape[0])


def _slabs(x: torch.Tensor, group: int, slab_bytes: int) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Volume, planes [start, end) of low resolution, and the planes [first, last) that these depend on."""
    volumes, _, depth, *_ = x.shape
    planes = max(slab_bytes // max(_plane_bytes(x) * group, 1), 1)
    # Of several slabs, each computes a neighbouring plane on either side again.
    step = depth if planes >= depth else max(planes - 2, 1)
    for n in range(volumes):
        for start in range(0, depth, step):
            end = min(start + step, depth)
            yield n, (start, end), (max(start - 1, 0), min(end + 1, depth))


def _group(x: torch.Tensor, channels: int, slab_bytes: int) -> int:
    """Output channels taken at once: 32 for fast products, fewer for slabs of 8 planes, which then share few."""
    fitting = slab_bytes // max(8 * _plane_bytes(x), 1)
    return max(min(channels, 32, max(fitting // 8 * 8, 8)), 1)


def _plane_bytes(x: torch.Tensor) -> int:
    """Of one output channel's products."""
    return 27 * x.shape[3] * x.shape[4] * max(x.element_size(), 4)


def _rows(x: torch.Tensor, n: int, first: int, last: int) -> torch.Tensor:
    """The voxels of some planes of a volume as rows of channels."""
    return x[n, :, first:last].movedim(0, -1).reshape(-1, x.shape[1])


def _gather(taps: tuple[torch.Tensor, ...], axis: int) -> torch.Tensor:
    """Both phases of the equations above along `axis`, interleaved: twice as long there."""
    low, mid, high = taps
    axis %= low.ndim
    count = low.shape[axis]
    shape = list(low.shape)
    shape.insert(axis + 1, 2)
    out = low.new_empty(shape)
    even, odd = out.unbind(axis + 1)
    before, after = (slice(None),) * axis + (slice(0, -1),), (slice(None),) * axis + (slice(1, None),)
    start, end = (slice(None),) * axis + (slice(0, 1),), (slice(None),) * axis + (slice(count - 1, None),)

    torch.add(low, torch.add(mid, high), alpha=3, out=even)
    even[after] += torch.add(mid, low, alpha=3)[before]
    even[before] += high[after]
    even[start] += mid[start] - low[start]
    even[end] += high[end]

    torch.add(high, torch.add(low, mid), alpha=3, out=odd)
    odd[before] += torch.add(mid, high, alpha=3)[after]
    odd[after] += low[before]
    odd[start] += low[start]
    odd[end] += mid[end] - high[end]
    return out.flatten(axis, axis + 1)


def _halved(grad: torch.Tensor, axis: int) -> torch.Tensor:
    """The adjoint of interpolation along one axis."""
    count = grad.shape[axis] // 2
    even, odd = grad.unflatten(axis, (count, 2)).unbind(axis + 1)
    later = torch.cat([even, odd.narrow(axis, count - 1, 1)], axis).narrow(axis, 1, count)
    earlier = torch.cat([even.narrow(axis, 0, 1), odd], axis).narrow(axis, 0, count)
    return 0.75 * (even + odd) + 0.25 * (later + earlier)


def _spread(grad: torch.Tensor, axis: int) -> torch.Tensor:
    """The adjoint of `_gather`: gradients of the three taps, stacked in front, half as long along `axis`."""
    axis %= grad.ndim
    count = grad.shape[axis] // 2
    even, odd = grad.unflatten(axis, (count, 2)).unbind(axis + 1)
    out = grad.new_empty(3, *even.shape)
    low, mid, high = out.unbind(0)
    before, after = (slice(None),) * axis + (slice(0, -1),), (slice(None),) * axis + (slice(1, None),)
    start, end = (slice(None),) * axis + (slice(0, 1),), (slice(None),) * axis + (slice(count - 1, None),)

    torch.add(even, odd, alpha=3, out=low)
    torch.add(odd, even, alpha=3, out=high)
    torch.add(even, odd, out=mid).mul_(3)
    mid[before] += even[after]
    mid[after] += odd[before]
    mid[start] += even[start]
    mid[end] += odd[end]
    # Each needs the other as it was.
    shifted = high[after].clone()
    high[after] += low[before]
    low[before] += shifted
    low[start] += odd[start] - even[start]
    high[end] += even[end] - odd[end]
    return out

"""Reading (N, C, *spatial) tensors as a few blocks of samples, without moving them where strides allow it."""

from __future__ import annotations

import torch


def _merged_stride(x: torch.Tensor, dims: list[int]) -> int | None:
    """The stride with which `dims`, taken as one flattened axis, are walked; None if no single stride does it."""
    merged: int | None = None
    expected = 0
    for dim in reversed(dims):
        size, stride = x.size(dim), x.stride(dim)
        if size == 1:
            continue
        if merged is None:
            merged = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 1 if merged is None else merged


def sample_blocks(x: torch.Tensor) -> torch.Tensor | None:
    """View `x` (N, C, *spatial) as (B, C, L), B·L = N·|spatial| samples of C channels, or None where a copy is needed.

    Channels-last tensors, matrices, and single volumes become one block (B = 1); contiguous batches become a block a
    volume (B = N). Slices along the batch or the channels are views too.
    """
    volumes, channels = x.shape[:2]
    if x.is_contiguous() and x.numel() > volumes * channels:
        return x.view(volumes, channels, -1)
    spatial = list(range(2, x.ndim))
    length = x.numel() // max(volumes * channels, 1)
    stride = _merged_stride(x, [0, *spatial])
    if stride is not None:
        return x.as_strided((1, channels, volumes * length), (0, x.stride(1), stride))
    stride = _merged_stride(x, spatial)
    if stride is not None:
        return x.as_strided((volumes, channels, length), (x.stride(0), x.stride(1), stride))
    return None


def readable_blocks(x: torch.Tensor) -> torch.Tensor:
    """`sample_blocks`, at the price of one copy where the strides of `x` allow no view."""
    blocks = sample_blocks(x)
    if blocks is None:
        blocks = sample_blocks(x.contiguous())
    assert blocks is not None  # a contiguous tensor always has a view
    return blocks


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if it is contiguous or channels-last, else a contiguous copy."""
    layouts = [torch.contiguous_format]
    layouts += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])
    return x if any(x.is_contiguous(memory_format=layout) for layout in layouts) else x.contiguous()

"""Parts of memory-mapped files, asked for before they are needed."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np

NEAR = 1 << 14
"""Bytes between two planes that are read along with them: one long read is faster than many short ones."""
SAMPLED = 5
"""Places that are looked at to tell whether a part is in the page cache."""


def will_need(part: np.ndarray) -> bool:
    """Have the system begin to read what a part of a memory map lies on, unless it is there, and return at once.

    Touching the part would wait for one run of pages after the other, and the system would read on past the end of
    each. Asked for plane by plane, they are on their way together, and nothing else is.

    Args:
        part: a view with any axes and strides, of a memory map or of other memory.

    Returns:
        Whether it is of a memory map; nothing is to be done for other memory.
    """
    file: np.memmap | None = None
    owner: object = part
    while isinstance(owner, np.ndarray | memoryview):
        file = owner if isinstance(owner, np.memmap) else file
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap):
        return False
    if part.size and hasattr(mmap, "MADV_WILLNEED"):
        starts, length = _planes(part)
        starts = starts - np.frombuffer(owner, np.uint8).ctypes.data
        if file is None or not _is_cached(file, starts):
            _advise(owner, *_together(starts, length))
    return True


def _planes(part: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each plane across the slowest axis begins in memory, and the bytes from its first voxel to its last."""
    reaches = [step * (count - 1) for step, count in zip(part.strides, part.shape, strict=True)]
    lowest = part.ctypes.data + sum(min(reach, 0) for reach in reaches)
    slowest = max(range(part.ndim), key=lambda axis: abs(part.strides[axis]))
    length = sum(abs(reach) for axis, reach in enumerate(reaches) if axis != slowest) + part.itemsize
    return lowest + np.arange(part.shape[slowest]) * abs(part.strides[slowest]), length


def _together(starts: np.ndarray, length: int) -> tuple[np.ndarray, int]:
    """The same as one run of bytes, where little lies between two planes."""
    if len(starts) > 1 and starts[1] - starts[0] - length > NEAR:
        return starts, length
    return starts[:1], int(starts[-1] - starts[0]) + length


def _is_cached(file: np.memmap, starts: np.ndarray) -> bool:
    """Whether some planes can be read without waiting: a system call each, where advice takes one for every plane."""
    if not hasattr(os, "RWF_NOWAIT") or file.filename is None:
        return False
    before = file.offset - file.offset % mmap.ALLOCATIONGRANULARITY
    try:
        descriptor = os.open(file.filename, os.O_RDONLY)
        try:
            for start in starts[:: max(1, len(starts) // SAMPLED)].tolist():
                os.preadv(descriptor, [bytearray(1)], before + start, os.RWF_NOWAIT)
        finally:
            os.close(descriptor)
    except OSError:  # above all that it would have to wait; or a file system that cannot tell
        return False
    return True


def _advise(owner: mmap.mmap, starts: np.ndarray, length: int) -> None:
    pages = starts - starts % mmap.PAGESIZE
    with contextlib.suppress(OSError):  # some file systems take no advice
        for page, bytes_ in zip(pages.tolist(), (starts + length - pages).tolist(), strict=True):
            owner.madvise(mmap.MADV_WILLNEED, page, bytes_)

"""Asking for the pages of a part of a memory map: all that it lies on, and little else."""

from __future__ import annotations

import mmap
import os
from itertools import permutations
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decovae.data import pages
from decovae.data.pages import will_need

PAGE = mmap.PAGESIZE
SHAPE = (24, 40, 64)
OFFSET = 128


class Recorder(mmap.mmap):
    """A memory map that keeps what it was asked for."""

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        assert option == mmap.MADV_WILLNEED
        assert length is not None
        super().madvise(option, start, length)
        self.asked.append((start, start + length))


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """An order of axes, and a slice of each, turned round or not."""
    axes = draw(st.sampled_from(list(permutations(range(3)))))
    slices = []
    for axis in axes:
        start = draw(st.integers(0, SHAPE[axis] - 1))
        stop = draw(st.integers(start + 1, SHAPE[axis]))
        turned = slice(stop - 1, None if start == 0 else start - 1, -1)
        slices.append(turned if draw(st.booleans()) else slice(start, stop))
    return axes, tuple(slices)


@given(
    parts(), st.sampled_from(["C", "F"]), st.sampled_from([np.int16, np.float64]), st.sampled_from([0, 2048, 1 << 14])
)
def test_every_voxel_is_asked_for_and_little_around_each_plane(
    part: tuple[tuple[int, ...], tuple[slice, ...]], order: str, dtype: type, near: int
) -> None:
    axes, slices = part
    memory = Recorder(-1, OFFSET + int(np.prod(SHAPE)) * np.dtype(dtype).itemsize)
    memory.asked = []
    whole = np.ndarray(SHAPE, dtype, buffer=memory, offset=OFFSET, order=order)
    wanted = whole.transpose(axes)[slices]
    with mock.patch.object(pages, "NEAR", near):
        assert will_need(wanted)
    start = np.frombuffer(memory, np.uint8).ctypes.data
    steps = zip(wanted.shape, wanted.strides, strict=True)
    offsets = np.meshgrid(*(np.arange(count) * step for count, step in steps), indexing="ij")
    bytes_of_voxels = wanted.ctypes.data - start + sum(offsets)
    asked = np.zeros(len(memory) + PAGE, dtype=bool)
    for first, last in memory.asked:
        assert first % PAGE == 0
        asked[first:last] = True
    assert asked[bytes_of_voxels].all()
    assert asked[bytes_of_voxels + wanted.itemsize - 1].all()
    slowest = max(range(3), key=lambda axis: abs(wanted.strides[axis]))
    plane = bytes_of_voxels.take([0], axis=slowest)
    extent = int(plane.max() - plane.min()) + wanted.itemsize
    between = min(abs(wanted.strides[slowest]) - extent, near)
    assert asked.sum() <= wanted.shape[slowest] * (extent + max(between, 0) + PAGE)


def test_a_map_of_a_file_is_told_from_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "volume.npy", np.arange(60).reshape(3, 4, 5))
    mapped = np.load(tmp_path / "volume.npy", mmap_mode="r")
    assert will_need(mapped[1:, ::-1])
    assert not will_need(np.zeros((3, 4, 5))[1:])
    assert not will_need(np.frombuffer(bytes(60), np.uint8).reshape(3, 4, 5))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system cannot tell what is in its page cache")
@pytest.mark.parametrize("offset", [0, 2 * mmap.ALLOCATIONGRANULARITY + 64])
def test_what_is_in_the_page_cache_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    path, asked = tmp_path / "volume", []
    path.write_bytes(bytes(offset) + np.arange(np.prod(SHAPE)).astype("<i4").tobytes())
    monkeypatch.setattr(pages, "_advise", lambda *part: asked.append(part))
    part = np.memmap(path, "<i4", mode="r", offset=offset, shape=SHAPE)[3:9, ::-1, 5:]
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system cannot tell what is in its page cache")
    assert will_need(part)
    assert not asked
    path.unlink()  # who cannot look asks
    assert will_need(part)
    assert len(asked) == 1

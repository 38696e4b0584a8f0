"""Ways of keeping a volume, and of reading a crop out of it: those that `bench.store_formats` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from decovae.data.pages import will_need
from decovae.data.store import file_axes
from decovae.data.volumes import Shape

Crop = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Format:
    """A way of keeping a volume.

    What is announced is asked of the system before the first voxel is touched.

    Attributes:
        write: puts a `(D, H, W)` array of int16 to a path, a file or a folder.
        read: opens what is there, and copies a crop out of it.
    """

    name: str
    write: Callable[[Path, np.ndarray], None]
    read: Callable[[Path, Crop], np.ndarray]


def _write_npy(path: Path, volume: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, volume)


def _read_npy(path: Path, crop: Crop, *, announced: bool = False) -> np.ndarray:
    wanted = np.load(path, mmap_mode="r")[crop]
    if announced:
        will_need(wanted)
    return np.array(wanted)


def _write_longest_first(path: Path, volume: np.ndarray) -> None:
    _write_npy(path, np.ascontiguousarray(volume.transpose(file_axes(volume.shape))))


def _read_longest_first(path: Path, crop: Crop, *, grid: Shape, announced: bool = False) -> np.ndarray:
    wanted = np.load(path, mmap_mode="r").transpose(np.argsort(file_axes(grid)))[crop]
    if announced:
        will_need(wanted)
    return np.array(wanted)


def _write_blocks(path: Path, volume: np.ndarray, *, side: int) -> None:
    """Blocks one behind the other, each in C order."""
    depth, height, width = (size // side for size in volume.shape)
    blocks = volume.reshape(depth, side, height, side, width, side).transpose(0, 2, 4, 1, 3, 5)
    _write_npy(path, np.ascontiguousarray(blocks))


def _read_blocks(path: Path, crop: Crop, *, side: int, announced: bool = False) -> np.ndarray:
    """As one copy a block, of the part of it that lies in the crop."""
    blocks = np.load(path, mmap_mode="r")
    found = np.empty([part.stop - part.start for part in crop], blocks.dtype)
    touched = [range(part.start // side, -(-part.stop // side)) for part in crop]
    if announced:
        will_need(blocks[tuple(slice(each.start, each.stop) for each in touched)])
    for i in touched[0]:
        for j in touched[1]:
            for k in touched[2]:
                inner, outer = [], []
                for block, part in zip((i, j, k), crop, strict=True):
                    first, last = max(part.start, block * side), min(part.stop, (block + 1) * side)
                    inner.append(slice(first - block * side, last - block * side))
                    outer.append(slice(first - part.start, last - part.start))
                found[tuple(outer)] = blocks[i, j, k][tuple(inner)]
    return found


def _write_bare(path: Path, volume: np.ndarray) -> None:
    volume.tofile(path)


def _read_bare(path: Path, crop: Crop, *, grid: Shape) -> np.ndarray:
    return np.array(np.memmap(path, np.int16, "r", shape=grid)[crop])


def _write_zarr(path: Path, volume: np.ndarray, *, side: int, codec: str) -> None:
    import zarr
    from zarr.codecs import BloscCodec, ZstdCodec

    compressors = {
        "none": None,
        "zstd": ZstdCodec(level=3),
        "blosc-lz4": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2),
    }
    zarr.create_array(
        path, data=volume, chunks=(side,) * 3, shards=volume.shape, compressors=compressors[codec], zarr_format=3
    )


def _read_zarr(path: Path, crop: Crop) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(path, mode="r")[crop])


def formats(grid: Shape) -> list[Format]:
    """All that are compared; zarr's only where it is installed."""
    write_blocks = partial(_write_blocks, side=32)
    found = [
        Format(".npy, C order", _write_npy, _read_npy),
        Format(".npy, C order, announced", _write_npy, partial(_read_npy, announced=True)),
        Format(".npy, longest axis first", _write_longest_first, partial(_read_longest_first, grid=grid)),
        Format(
            ".npy, longest axis first, announced",
            _write_longest_first,
            partial(_read_longest_first, grid=grid, announced=True),
        ),
        Format("bare voxels, C order", _write_bare, partial(_read_bare, grid=grid)),
        Format(".npy, blocks of 32³", write_blocks, partial(_read_blocks, side=32)),
        Format(".npy, blocks of 32³, announced", write_blocks, partial(_read_blocks, side=32, announced=True)),
    ]
    try:
        import zarr  # noqa: F401
    except ImportError:
        print("zarr is not installed, its rows are left out: pip install -e '.[bench]'")
        return found
    return found + [
        Format(f"zarr, chunks of {side}³, {codec}", partial(_write_zarr, side=side, codec=codec), _read_zarr)
        for codec in ("none", "zstd", "blosc-lz4")
        for side in (32, 64)
    ]

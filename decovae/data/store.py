"""Volumes prepared for training: 16 bits a voxel, a file each, mapped into memory: a crop reads what it touches.

A store is a folder with

- `store.json`: format and version, the grid, the axes in files, the settings it was prepared with, the number of
  volumes, and the SHA-256 of the index;
- `index.jsonl`: a JSON object a volume, sorted by subject and source: whose it is, the file that it came from and that
  file's SHA-256, the store's own file and its SHA-256, the scaling, shape and affine, places in the brain, columns;
- `volumes/ab/<40 digits of its SHA-256>.npy`: the voxels, little-endian `int16`, or `float16` where the range is too
  wide, in RAS axes in the order that `axes` in `store.json` tells: the longest first, so that what a crop covers lies
  close together. `(q − low) / (high − low)` is the scaled intensity, unclipped.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from decovae.data.store_index import Index, canonical
from decovae.data.volumes import Shape, VolumeRecord, times
from decovae.errors import InputError

FORMAT = "decovae-store"
VERSION = 1
STORE = "store.json"
INDEX = "index.jsonl"
VOLUMES = "volumes"
FILE = re.compile(rf"{VOLUMES}/[0-9a-f]{{2}}/[0-9a-f]{{40}}\.npy")
JOURNAL = "progress.jsonl"
"""What a preparation keeps of its progress."""
PREPARE = "run `decovae prepare` on its volumes again"


def volume_file(sha256: str) -> str:
    """Where a store keeps the volume file of a SHA-256, relative to its folder, with forward slashes.

    Other voxels have another name: whoever reads a store while it is prepared anew meets a missing file, never voxels
    that its index does not know.
    """
    return f"{VOLUMES}/{sha256[:2]}/{sha256[:40]}.npy"


def file_axes(grid: Shape) -> Shape:
    """The axes of a grid in the order in which files have them: the longest first.

    Of 128×256×128 voxels a crop of 96³ then covers three eighths, all of them in one piece; with the axes as they are
    it would be 96 pieces of a quarter of all pages.
    """
    first, second, third = sorted(range(3), key=lambda axis: (-grid[axis], axis))
    return first, second, third


@lru_cache(maxsize=8)
def npy_header(grid: Shape, dtype: str) -> bytes:
    """What stands in front of the voxels in a store's file: the header of NumPy's format, a multiple of 64 bytes."""
    header = io.BytesIO()
    descr = np.dtype(dtype).newbyteorder("<").str
    shape = tuple(grid[axis] for axis in file_axes(grid))
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue()


def file_size(grid: Shape, dtype: str) -> int:
    """Bytes of a volume's file."""
    return len(npy_header(grid, dtype)) + 2 * math.prod(grid)


def file_parts(voxels: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The header and the voxels of a volume's file; the latter are not copied if they have its order already.

    Args:
        voxels: `(D, H, W)`, `int16` or `float16`.
    """
    depth, height, width = voxels.shape
    grid = depth, height, width
    return npy_header(grid, voxels.dtype.name), np.ascontiguousarray(voxels.transpose(file_axes(grid)))


def map_file(path: Path, grid: Shape, dtype: str) -> np.ndarray:
    """The voxels in a volume's file, `(D, H, W)`, a read-only memory map.

    Raises:
        InputError: the file cannot be read, or is no such volume.
    """
    header, size = npy_header(grid, dtype), file_size(grid, dtype)
    axes = file_axes(grid)
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                raise InputError(f"{path}: not {times(grid)} voxels in {dtype}, as the index says; {PREPARE}.")
            if (there := file.seek(0, os.SEEK_END)) != size:
                raise InputError(f"{path}: {there} bytes instead of {size}; {PREPARE}.")
            shape = tuple(grid[axis] for axis in axes)
            mapped: np.ndarray = np.memmap(file, dtype, mode="r", offset=len(header), shape=shape)
    except OSError as error:
        raise InputError(f"{path}: a volume that cannot be read ({error.strerror or error}); {PREPARE}.") from error
    return mapped.transpose(np.argsort(axes))


class StoreVolumes:
    """The volumes of a store.

    Attributes:
        folder: where it lies.
        grid: the size of every volume.
        settings: what it was prepared with, as `store.json` has it.
        records: one record a volume, parsed when asked for; `low` and `high` are in the unit of `read`.
    """

    def __init__(self, folder: Path, index: Index, description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.grid: Shape = tuple(description["grid"])
        self.settings: Mapping[str, Any] = description["settings"]
        self._description = description
        self._index = index

    @property
    def records(self) -> Sequence[VolumeRecord]:
        """One record a volume."""
        return self._index

    @property
    def checksum(self) -> str:
        """What two stores of the same volumes, prepared alike, have in common; see `store_checksum`."""
        return hashlib.sha256(canonical(self._description).encode()).hexdigest()

    def entry(self, index: int) -> Mapping[str, Any]:
        """All that the index says of a volume.

        Raises:
            InputError: it is no entry of a store.
        """
        return self._index.entry(index)

    def file(self, index: int) -> Path:
        """Where volume `index` lies.

        Raises:
            InputError: it is no entry of a store, or names a file elsewhere.
        """
        return self._file(self._index.entry(index))

    def _file(self, entry: Mapping[str, Any]) -> Path:
        if not FILE.fullmatch(str(entry["file"])):
            raise InputError(f"{self.folder / INDEX}: names a file that is none of a store's: {entry['file']!r}.")
        return self.folder / str(entry["file"])

    def read(self, index: int) -> np.ndarray:
        """Volume `index`, `(D, H, W)`, `int16` or `float16`, a read-only memory map.

        Raises:
            InputError: the file is missing, or is not what the index says.
        """
        entry = self._index.entry(index)
        return map_file(self._file(entry), self.grid, "float16" if entry["dtype"] == "float16" else "int16")


def is_store(path: Path) -> bool:
    """Whether a folder holds a store, in order or not, finished or not."""
    if (path / STORE).is_file() or (path / JOURNAL).is_file():
        return True
    files = (path / VOLUMES).glob("[0-9a-f][0-9a-f]/*.npy")
    return any(FILE.fullmatch(file.relative_to(path).as_posix()) for file in files)


def open_store(path: Path) -> StoreVolumes:
    """The volumes of a store; their files are looked at when they are read.

    Raises:
        InputError: no store, one of another version, or an index that does not belong to it.
    """
    description = _description(path)
    try:
        index = Index(path / INDEX)
    except (OSError, ValueError) as error:
        raise InputError(f"{path / INDEX}: the index cannot be read ({error}); {PREPARE}.") from error
    if index.digest != description.get("index_sha256") or len(index) != description.get("volumes"):
        raise InputError(f"{path}: its index is not the one that {STORE} was written for; {PREPARE}.")
    return StoreVolumes(path, index, description)


def store_checksum(folder: Path) -> str:
    """What a store holds, in 64 hexadecimal digits: the SHA-256 of what `store.json` says, with the index's checksum in
    it, as those of the volumes are in the index.

    Raises:
        InputError: as `open_store`.
    """
    return open_store(folder).checksum


def _description(folder: Path) -> dict[str, Any]:
    path = folder / STORE
    try:
        description = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{folder}: not a finished store ({STORE}: {error.strerror or error}); {PREPARE}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, no JSON; {PREPARE}.") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"{path}: not the description of a volume store; name a folder that `decovae prepare` wrote.")
    if description.get("version") != VERSION:
        raise InputError(
            f"{path}: a store of version {description.get('version')}, where this DeCo-VAE reads {VERSION}; {PREPARE}."
        )
    grid, settings = description.get("grid"), description.get("settings")
    if not (
        isinstance(settings, dict)
        and isinstance(grid, list)
        and len(grid) == 3
        and all(isinstance(size, int) and size > 0 for size in grid)
        and description.get("axes") == list(file_axes((grid[0], grid[1], grid[2])))
    ):
        raise InputError(f"{path}: damaged, without grid, axes or settings; {PREPARE}.")
    return description

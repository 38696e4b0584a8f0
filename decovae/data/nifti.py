"""NIfTI volumes where they lie: checked when opened, read in RAS axes as views, never converted as a whole."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from decovae.data.inspection import Measurement, accepted, for_all, measured
from decovae.data.sources import Source, find_volumes
from decovae.data.volumes import Affine, LeftOut, Shape, VolumeRecord, Volumes, affine_rows, intensity_range, times
from decovae.errors import InputError

GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class NiftiVolumes:
    """Volumes in NIfTI-1 or NIfTI-2 files, compressed or not."""

    records: Sequence[VolumeRecord]

    def read(self, index: int) -> np.ndarray:
        """Volume `index`, `(D, H, W)` in RAS axes, in stored units: slope and intercept are not applied.

        A memory map for an uncompressed file. `records[index].low` and `.high` are in the same units; `low` is the
        larger one where the file's slope is negative.

        Raises:
            InputError: the file has changed for the worse since it was checked.
        """
        return read_nifti(Path(self.records[index].source)).voxels


def open_nifti(root: Path, *, patch: Shape, workers: int | None = None) -> Volumes:
    """The volumes of a folder or a CSV manifest (see `find_volumes`), each one read and checked.

    What is learnt of a file is kept in the cache folder, so that a second opening only looks at sizes and times. Where
    several processes open the same root, let one go first.

    Args:
        root: the folder or manifest.
        patch: the smallest shape, in RAS axes, that a volume may have: crops larger than the volume are invented.
        workers: threads that read and check; by default one a CPU, at most 8.

    Raises:
        InputError: one sentence about the first volume that cannot be trained on, and how many more there are.
    """
    return NiftiVolumes(accepted(_checked(find_volumes(root), patch, workers)))


def open_usable_nifti(root: Path, *, patch: Shape, workers: int | None = None) -> tuple[Volumes, list[LeftOut]]:
    """As `open_nifti`, but volumes that cannot be used are left out, and named.

    Returns:
        The volumes that can be used, and every other one with the sentence that `open_nifti` would have raised; files
        that a manifest names and that do not exist are among them.

    Raises:
        InputError: nothing at `root`, an unreadable manifest, or no volume can be used.
    """
    sources = find_volumes(root, all_there=False)
    records: list[VolumeRecord] = []
    left_out: list[LeftOut] = []
    for source, result in zip(sources, _checked(sources, patch, workers), strict=True):
        if isinstance(result, InputError):
            left_out.append(LeftOut(source.subject, str(source.path), str(result)))
        else:
            records.append(result)
    if not records:
        raise InputError(
            f"None of the {len(sources)} volumes of {root} can be used; of the first: {left_out[0].reason}"
        )
    return NiftiVolumes(records), left_out


def _checked(sources: Sequence[Source], patch: Shape, workers: int | None) -> list[VolumeRecord | InputError]:
    return for_all(partial(_record, patch=patch), sources, description="Checking volumes", workers=workers)


class Stored(NamedTuple):
    """What is in a NIfTI file.

    Attributes:
        voxels: as they are stored, `(D, H, W)`, turned to RAS axes as a view.
        inverted: whether the file's slope is negative.
        affine: from indices of `voxels` to millimetres.
    """

    voxels: np.ndarray
    inverted: bool
    affine: Affine


def read_nifti(path: Path) -> Stored:
    """A file's voxels and their place; slope and intercept are not applied.

    Raises:
        InputError: not a file, not NIfTI, truncated, not 3D, or not of real numbers.
    """
    content = _content(path)
    try:
        header = _header(content)
        shape = _spatial_shape(header)
        dtype = _dtype(header)
        offset = max(header.get_data_offset(), header.single_vox_offset)  # 0 stands for "right after the header"
        slope, _ = header.get_slope_inter()
        stored_affine = _affine(header)
        axes = nib.io_orientation(stored_affine)
    except (ValueError, HeaderDataError) as error:
        raise InputError(f"The volume {path} {_predicate(error)}.") from error
    promised = offset + math.prod(shape) * dtype.itemsize
    if promised > len(content):
        raise InputError(f"The volume {path} is truncated: {promised} bytes are promised, {len(content)} are there.")
    stored: np.ndarray = np.ndarray(shape, dtype, buffer=content, offset=offset, order="F")
    return Stored(
        nib.apply_orientation(stored, axes),
        slope is not None and slope < 0,
        affine_rows(stored_affine @ nib.orientations.inv_ornt_aff(axes, shape)),
    )


def _record(item: Source, *, patch: Shape) -> VolumeRecord:
    subject, path, columns = item
    shape, low, high, affine = measured(path, _measure)
    if any(size < least for size, least in zip(shape, patch, strict=True)):
        raise InputError(
            f"The volume {path} is {times(shape)} voxels (in RAS axes), smaller than the patch {times(patch)}."
        )
    return VolumeRecord(subject, str(path), shape, low, high, affine, columns)


def _measure(path: Path) -> Measurement:
    volume, inverted, affine = read_nifti(path)
    depth, height, width = volume.shape
    if not volume.size:
        raise InputError(f"The volume {path} is {times((depth, height, width))} voxels: empty.")
    try:
        low, high = intensity_range(volume, inverted=inverted)
    except ValueError as error:
        raise InputError(f"The volume {path} {error}.") from error
    return Measurement((depth, height, width), low, high, affine)


def _content(path: Path) -> Any:
    """A file's bytes, decompressed or memory-mapped. By its content, not its name: scanners' exports mix them up."""
    try:
        with path.open("rb") as file:
            magic = file.read(2)
            if not magic:
                raise InputError(f"The volume {path} is an empty file.")
            if magic == GZIP_MAGIC:
                return gzip.decompress(magic + file.read())
        return np.memmap(path, mode="r")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"The volume {path} is truncated or damaged: {str(error).rstrip('.')}.") from error
    except OSError as error:
        raise InputError(f"The volume {path} cannot be read: {error.strerror or error}.") from error


def _header(content: Any) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        block = bytes(content[: kind.sizeof_hdr])
        if kind.may_contain_header(block):
            header = kind(block, check=False)  # nibabel's own check repairs some fields and logs; ours only rejects
            if bytes(header["magic"]).startswith(b"n+"):
                return header
            raise ValueError("is half of a .hdr/.img pair: convert it to one .nii file")
    raise ValueError("is not a NIfTI file")


def _spatial_shape(header: Any) -> Shape:
    sizes = tuple(int(size) for size in header.get_data_shape())
    if any(size < 0 for size in sizes):
        raise ValueError(f"has a negative size in its header: {times(sizes)}")
    if len(sizes) > 3 and any(size != 1 for size in sizes[3:]):
        raise ValueError(f"is {len(sizes)}D ({times(sizes)}): split it into 3D volumes")
    if len(sizes) < 3:
        raise ValueError(f"is {len(sizes)}D ({times(sizes)}): only 3D volumes can be trained on")
    return sizes[0], sizes[1], sizes[2]


def _dtype(header: Any) -> np.dtype:
    try:
        dtype: np.dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise ValueError(f"has voxels of an unknown type, code {int(header['datatype'])}") from error
    if dtype.kind not in "iuf":
        raise ValueError(f"has {'RGB' if dtype.names else dtype.name} voxels, not real numbers")
    return dtype


def _affine(header: Any) -> np.ndarray:
    affine = np.asarray(header.get_best_affine())
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise ValueError("has an affine that does not say where its axes point")
    return affine


def _predicate(error: Exception) -> str:
    """What an error says, to follow "the volume …": ours begin with a verb, nibabel's get one."""
    message = str(error).rstrip(".")
    return message if message.startswith(("is ", "has ")) else f"has a damaged header: {message}"

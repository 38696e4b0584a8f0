"""NIfTI volumes where they lie: checked when opened, read in RAS axes as views, never converted as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from decovae.data.file_bytes import Content, opened, printable
from decovae.data.foreground import foreground_places
from decovae.data.inspection import Measurement, accepted, for_all, measured
from decovae.data.nifti_header import HEAD, Header, parse_header
from decovae.data.pairs import halves
from decovae.data.sources import Source, find_volumes
from decovae.data.volumes import Affine, LeftOut, Shape, VolumeRecord, Volumes, affine_rows, intensity_range, times
from decovae.errors import InputError

LIMIT = 2 << 30
"""Bytes of one volume: a head at a quarter of a millimetre in 16 bits has fewer."""


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
        zero: the stored value that stands for an intensity of 0; the dtype of the voxels need not have it.
        digest: SHA-256 of the file as it lies there, in hexadecimal, if it was asked for. Of a .hdr/.img pair: that of
            the two files' digests one after the other, the header's first.
    """

    voxels: np.ndarray
    inverted: bool
    affine: Affine
    zero: float
    digest: str


def read_nifti(path: Path, *, limit: int = LIMIT, checksum: bool = False, guess: bool = True) -> Stored:
    """A file's voxels and their place; slope and intercept are not applied.

    The header is read first, and no more is decompressed than it promises.

    Args:
        path: a .nii file, or either half of a .hdr/.img pair, compressed or not.
        limit: bytes that a volume may have before anything is done to it.
        checksum: compute `digest`.
        guess: take nibabel's guess, LAS, where the header does not say where its axes point; else refuse it.

    Raises:
        InputError: not a file, not NIfTI, truncated, larger than `limit`, not 3D, sheared, or not of real numbers.
    """
    try:
        first, second = halves(path)
    except OSError as error:
        raise InputError(f"The volume {printable(path)} cannot be read: {error.strerror}.") from error
    digest = ""
    with opened(first, volume=path) as content:
        header = parse_header(content.head(HEAD))
        if header.guessed and not guess:
            raise ValueError(
                "does not say which side is left (qform_code and sform_code are 0): find it out and write it into the "
                "file; where nibabel's guess is right, nib.save(nib.Nifti1Image(image.dataobj, image.affine), …) does"
            )
        if header.paired != (first != second):
            raise ValueError(
                "is half of a .hdr/.img pair by its header, but not by its name: name both halves alike, one .hdr and "
                "one .img"
                if header.paired
                else "is a whole volume by its header, but half of a .hdr/.img pair by its name: name it .nii"
            )
        if not header.paired:
            return _stored(content, header, limit=limit, checksum=checksum)
        if checksum:
            digest = content.digest()
    with opened(second, volume=path) as content:
        stored = _stored(content, header, limit=limit, checksum=checksum)
    return stored._replace(digest=sha256((digest + stored.digest).encode()).hexdigest() if checksum else "")


def _stored(content: Content, header: Header, *, limit: int, checksum: bool) -> Stored:
    content_bytes = content.whole(header.end, limit=limit)
    stored: np.ndarray = np.ndarray(header.shape, header.dtype, buffer=content_bytes, offset=header.offset, order="F")
    axes = nib.io_orientation(header.affine)
    return Stored(
        nib.apply_orientation(stored, axes),
        header.inverted,
        affine_rows(header.affine @ nib.orientations.inv_ornt_aff(axes, header.shape)),
        header.zero,
        content.digest() if checksum else "",
    )


def _record(item: Source, *, patch: Shape) -> VolumeRecord:
    subject, path, columns, session = item
    shape, low, high, affine, foreground = measured(path, _measure)
    if any(size < least for size, least in zip(shape, patch, strict=True)):
        raise InputError(
            f"The volume {path} is {times(shape)} voxels (in RAS axes), smaller than the patch {times(patch)}."
        )
    return VolumeRecord(subject, str(path), shape, low, high, affine, columns, session, foreground)


def _measure(path: Path) -> Measurement:
    volume, inverted, affine, _, _ = read_nifti(path)
    depth, height, width = volume.shape
    try:
        low, high = intensity_range(volume, inverted=inverted)
    except ValueError as error:
        raise InputError(f"The volume {printable(path)} {error}.") from error
    return Measurement((depth, height, width), low, high, affine, foreground_places(volume, low=low, high=high))

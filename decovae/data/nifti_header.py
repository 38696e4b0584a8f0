"""What a NIfTI header says, or in which way it cannot be believed."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from decovae.data.file_bytes import GZIP_MAGIC
from decovae.data.volumes import Shape, times

HEAD = 540
"""Bytes that hold a header of either version."""
SHEAR = 1.0
"""Degrees that two axes may be off their right angle: voxels are read as bricks."""
VOXEL_SIZES = (1e-3, 1e3)
"""Millimetres; what lies outside is damage, and would make numbers overflow."""

XFORM_CODES = range(6)
"""What qform_code and sform_code may be; 0 stands for nothing."""
MILLIMETRES = (0, 2)
"""Codes of NIfTI's for millimetres, and for a unit that is not told."""

_OTHER_UNITS = {1: "metres", 3: "micrometres"}
_NOWHERE = "has an affine that does not say where its axes point: convert it again from the scanner's original"


class Header(NamedTuple):
    """Where a volume's voxels are and what they stand for.

    Attributes:
        shape: voxels along the file's axes, the first one fastest.
        dtype: of the voxels, with its byte order.
        offset: of the voxels' first byte, in their file.
        paired: whether they lie in a file of their own, beside the header's.
        inverted: whether the slope is negative.
        zero: the stored value that stands for 0; the dtype need not have it.
        affine: from indices to millimetres, `(4, 4)`, float64.
        guessed: whether nothing says where the axes point: `affine` is then nibabel's guess, LAS.
    """

    shape: Shape
    dtype: np.dtype
    offset: int
    paired: bool
    inverted: bool
    zero: float
    affine: np.ndarray
    guessed: bool

    @property
    def end(self) -> int:
        """Bytes of the voxels' file that belong to the volume."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def parse_header(head: bytes) -> Header:
    """The header at the beginning of a file, version 1 or 2, of either byte order.

    Raises:
        ValueError: not NIfTI, not 3D, not of real numbers, or a field that cannot be true. The message completes "the
            volume …".
    """
    header = _header(head)
    shape = _spatial_shape(header["dim"])
    paired = header["magic"].item().startswith(b"ni")
    with np.errstate(all="ignore"):  # in damaged fields; what comes of it is checked
        slope, intercept = _scaling(header)
        affine = _affine(header)
        zero = -intercept / slope
    if not math.isfinite(zero):
        raise ValueError(f"has a damaged header: slope {slope:g} and intercept {intercept:g}")
    offset = _offset(header, paired=paired)
    guessed = not (header["sform_code"] or header["qform_code"])
    return Header(shape, _dtype(header), offset, paired, slope < 0, zero + 0.0, affine, guessed)


def _header(head: bytes) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.sizeof_hdr
        for order, endianness in (("little", "<"), ("big", ">")):
            if len(head) >= size and head[:4] == size.to_bytes(4, order):
                # Not checked by nibabel, which repairs some fields and logs: a field is believed or refused here.
                header = kind(head[:size], endianness, check=False)
                if header["magic"].item()[:3] in (b"n+1", b"ni1", b"n+2", b"ni2"):
                    return header
                raise ValueError(
                    "is not a NIfTI file but one of Analyze 7.5, which does not say which side is left, or its header "
                    "is damaged: convert the scanner's original to NIfTI"
                )
    if head.startswith(GZIP_MAGIC):
        raise ValueError("is compressed with gzip twice: decompress it once")
    raise ValueError("is not a NIfTI file")


def _spatial_shape(dim: np.ndarray) -> Shape:
    count = int(dim[0])
    if not 1 <= count <= 7:
        raise ValueError(f"has a damaged header: {count} dimensions")
    sizes = tuple(int(size) for size in dim[1 : count + 1])
    if any(size < 0 for size in sizes):
        raise ValueError(f"has a negative size in its header: {times(sizes)}")
    if not all(sizes):
        raise ValueError(f"is {times(sizes)} voxels: empty")
    if any(size != 1 for size in sizes[3:]):
        raise ValueError(f"is {count}D ({times(sizes)}): split it into 3D volumes")
    if count < 3:
        raise ValueError(f"is {count}D ({times(sizes)}): only 3D volumes can be trained on")
    return sizes[0], sizes[1], sizes[2]


def _dtype(header: Any) -> np.dtype:
    try:
        dtype: np.dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise ValueError(f"has voxels of an unknown type, code {int(header['datatype'])}") from error
    if dtype.kind == "V" and not dtype.names:
        raise ValueError(f"has voxels of an unknown type, code {int(header['datatype'])}")
    if dtype.kind not in "iuf":
        raise ValueError(f"has {'RGB' if dtype.names else dtype.name} voxels, not real numbers")
    if dtype.itemsize > 8:
        raise ValueError(f"has voxels of {8 * dtype.itemsize} bits: convert them to 32-bit floating point")
    return dtype


def _offset(header: Any, *, paired: bool) -> int:
    offset = header["vox_offset"].item()
    first = 0 if paired else header.single_vox_offset
    if not (math.isfinite(offset) and offset == int(offset) and (offset == 0 or offset >= first)):
        raise ValueError(f"has a damaged header: its voxels would begin at byte {offset:g}")
    return max(int(offset), first)  # 0 stands for right after the header


def _scaling(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # as the standard has it: no scaling
    if not math.isfinite(intercept):
        raise ValueError(f"has a damaged header: intercept {intercept:g}")
    return slope, intercept


def _affine(header: Any) -> np.ndarray:
    """The place in space that nibabel would choose: the sform, else the qform, else voxel sizes alone.

    Voxel sizes beside an sform are not looked at: the sform has its own.
    """
    for name in ("qform_code", "sform_code"):
        if int(header[name]) not in XFORM_CODES:
            raise ValueError(f"has a damaged header: {name} {int(header[name])}")
    unit = int(header["xyzt_units"]) & 7
    if unit not in MILLIMETRES:
        named = f" ({_OTHER_UNITS[unit]})" if unit in _OTHER_UNITS else ""
        raise ValueError(
            f"has sizes in another unit than millimetres by its header, code {unit}{named}: convert its affine and "
            "voxel sizes to millimetres, and set xyzt_units to 2"
        )
    if not header["sform_code"]:
        sizes = [float(size) for size in header["pixdim"][1:4]]
        if not all(0 < size < math.inf for size in sizes):
            raise ValueError(f"has voxel sizes that cannot be: {_millimetres(sizes)}")
        if header["pixdim"][0] != -1:
            header["pixdim"][0] = 1  # the standard's meaning of anything else, which nibabel refuses
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except (ValueError, HeaderDataError) as error:
        raise ValueError(_NOWHERE) from error
    columns = affine[:3, :3]
    sizes = np.linalg.norm(columns, axis=0).tolist()
    if not np.isfinite(affine).all() or 0 in sizes:
        raise ValueError(_NOWHERE)
    if min(sizes) < VOXEL_SIZES[0] or max(sizes) > VOXEL_SIZES[1]:
        raise ValueError(f"has voxel sizes that cannot be: {_millimetres(sizes)}")
    directions = columns / sizes
    shear = max(
        _degrees_off(directions[:, first] @ directions[:, second]) for first, second in combinations(range(3), 2)
    )
    if shear > SHEAR:
        raise ValueError(
            f"is sheared: its axes are up to {shear:.1f}° off right angles; resample it to a grid without shear, for "
            "example with nilearn.image.resample_img"
        )
    return affine


def _degrees_off(cosine: float) -> float:
    return math.degrees(math.asin(min(abs(cosine), 1.0)))


def _millimetres(sizes: list[float]) -> str:
    return "×".join(f"{size:g}" for size in sizes) + " mm"

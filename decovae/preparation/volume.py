"""One volume on its way into a store: read, checked, masked, resized, scaled, in 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decovae.data.file_bytes import printable
from decovae.data.foreground import foreground_places
from decovae.data.frame import Frame
from decovae.data.nifti import Stored, read_nifti
from decovae.data.resample import resample_crop, resample_true_size
from decovae.data.store import file_axes, volume_file
from decovae.data.volumes import Shape, intensity_range
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.mask import masked, mni_mask, named_mask
from decovae.preparation.sixteen_bits import Checksum, sixteen_bits

LARGEST_GRID = 2**31
"""Voxels; files of 4 GiB."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to every volume."""

    grid: tuple[int, int, int] = (128, 256, 128)
    """Voxels of a prepared volume, left→right, posterior→anterior, inferior→superior."""
    fit: Literal["resize", "resample"] = "resize"
    """resize: the whole volume, stretched to the grid. resample: voxels of --volume.spacing around the volume's centre,
    cut off where the grid ends and filled up with the darkest intensity where the volume does."""
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Millimetres of a voxel, with --volume.fit resample."""
    mask: Literal["none", "column", "mni"] = "none"
    """What is kept, with zero in the place of the rest. none: everything. column: the voxels of the mask that the
    manifest names in a column `mask`. mni: the brain of the MNI-152 template, for volumes in its space."""
    limit_gib: float = 2.0
    """Volumes that take more memory than this, decompressed, are left out; in GiB."""

    def __post_init__(self) -> None:
        """Raises:
        InputError: a value that nothing can be prepared with.
        """
        if min(self.grid) < 1 or math.prod(self.grid) > LARGEST_GRID:
            raise InputError(f"--volume.grid {self.grid}: three sizes of at least 1 voxel, of 2³¹ together at most.")
        if not all(0 < size < math.inf for size in self.spacing):
            raise InputError(f"--volume.spacing {self.spacing}: three sizes in millimetres, above 0.")
        if not 0 < self.limit_gib < math.inf:
            raise InputError(f"--volume.limit-gib {self.limit_gib}: a size in GiB, above 0.")


class Prepared(NamedTuple):
    """A volume as a store keeps it: `voxels`, `(D, H, W)`, int16 or float16, in memory as in the file, and its `entry`
    in the index."""

    voxels: np.ndarray
    entry: dict[str, Any]


def prepare_volume(candidate: Candidate, preparation: Preparation) -> Prepared:
    """A volume's voxels and its entry in the index: a function of the file's bytes and of the arguments, whatever the
    number of threads.

    Where a header does not say which side is left, training on the file itself takes a guess, but a store would hand it
    on as knowledge: such a volume is refused, as those of Analyze are.

    Raises:
        InputError: the volume cannot be used, and why.
    """
    if preparation.mask == "column" and candidate.mask is None:
        raise InputError(f"The volume {printable(candidate.path)} has no mask: the manifest's column `mask` is empty.")
    limit = int(preparation.limit_gib * 2**30)
    stored = read_nifti(candidate.path, limit=limit, checksum=True, guess=False)
    try:
        with np.errstate(all="ignore"):  # what overflows is looked for, and said in one sentence
            return _prepared(_kept(stored, candidate, preparation.mask, limit=limit), candidate, preparation)
    except ValueError as error:
        raise InputError(f"The volume {printable(candidate.path)} {error}.") from error


def _kept(stored: Stored, candidate: Candidate, mask: str, *, limit: int) -> Stored:
    """The volume with what its mask leaves of it."""
    if mask == "mni":
        return stored._replace(voxels=masked(stored, mni_mask(stored)))
    if mask == "column" and candidate.mask is not None:
        return stored._replace(voxels=masked(stored, named_mask(candidate.mask, stored, limit=limit)))
    return stored


def _prepared(stored: Stored, candidate: Candidate, preparation: Preparation) -> Prepared:
    low, high = intensity_range(stored.voxels, inverted=stored.inverted)
    if preparation.fit == "resize":
        depth, height, width = stored.voxels.shape
        frame = Frame((depth, height, width), stored.affine)
        grid = preparation.grid
        scaled = resample_crop(stored.voxels, grid=grid, corner=(0, 0, 0), size=grid, low=low, high=high)
    else:
        scaled, frame = _true_size(stored, preparation.grid, preparation.spacing, low=low, high=high)
    axes = file_axes(preparation.grid)
    in_file_order = scaled.permute(axes)
    darkest, brightest = (float(extreme) for extreme in torch.aminmax(in_file_order))
    with Checksum(preparation.grid) as checksum:  # that of what is there already, while the rest is made
        in_file, zero, one = sixteen_bits(in_file_order, darkest=darkest, brightest=brightest, done=checksum.add)
        if preparation.fit == "resize":
            foreground = foreground_places(stored.voxels, low=low, high=high)
        else:
            foreground = foreground_places(scaled.numpy(), low=0.0, high=1.0)
    voxels = in_file.transpose(np.argsort(axes))
    entry = {
        "subject": candidate.subject,
        "session": candidate.session,
        "source": candidate.source,
        "source_sha256": stored.digest,
        "file": volume_file(checksum.hexdigest()),
        "sha256": checksum.hexdigest(),
        "dtype": voxels.dtype.name,
        "low": zero,
        "high": one,
        "range": [darkest, brightest],
        **frame.as_dict(),
        "foreground": foreground.hex(),
        "columns": dict(candidate.columns),
    }
    return Prepared(voxels, entry)


def _true_size(
    stored: Stored, grid: Shape, spacing: tuple[float, float, float], *, low: float, high: float
) -> tuple[Tensor, Frame]:
    """The volume in voxels of a size in millimetres, and where they lie."""
    depth, height, width = stored.voxels.shape
    frame = Frame((depth, height, width), stored.affine)
    return (
        resample_true_size(stored.voxels, grid=grid, ratios=frame.ratios(spacing), low=low, high=high),
        frame.true_size(grid, spacing),
    )

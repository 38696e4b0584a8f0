"""One volume on its way into a store: read, checked, masked, resized, scaled, in 16 bits."""

from __future__ import annotations

import hashlib
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
from decovae.data.store import file_axes, file_parts, volume_file
from decovae.data.volumes import Shape, intensity_range
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.mask import masked, mni_mask, named_mask

COARSEST = 2**11
"""Steps in the scaled range 0 to 1 that 16 bits have to allow, or they are floating-point numbers."""
LARGEST_FLOAT16 = 65504.0
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

    Raises:
        InputError: the volume cannot be used, and why.
    """
    limit = int(preparation.limit_gib * 2**30)
    stored = read_nifti(candidate.path, limit=limit, checksum=True)
    try:
        with np.errstate(all="ignore"):  # what overflows is looked for, and said in one sentence
            return _prepared(_kept(stored, candidate, preparation.mask, limit=limit), candidate, preparation)
    except ValueError as error:
        raise InputError(f"The volume {printable(candidate.path)} {error}.") from error


def _kept(stored: Stored, candidate: Candidate, mask: str, *, limit: int) -> Stored:
    """The volume with what its mask leaves of it."""
    if mask == "none":
        return stored
    if mask == "mni":
        return stored._replace(voxels=masked(stored, mni_mask(stored)))
    if candidate.mask is None:
        raise ValueError("has no mask: the manifest's column `mask` is empty")
    return stored._replace(voxels=masked(stored, named_mask(candidate.mask, stored, limit=limit)))


def _prepared(stored: Stored, candidate: Candidate, preparation: Preparation) -> Prepared:
    low, high = intensity_range(stored.voxels, inverted=stored.inverted)
    if preparation.fit == "resize":
        depth, height, width = stored.voxels.shape
        frame = Frame((depth, height, width), stored.affine)
        grid = preparation.grid
        scaled = resample_crop(stored.voxels, grid=grid, corner=(0, 0, 0), size=grid, low=low, high=high)
        foreground = foreground_places(stored.voxels, low=low, high=high)
    else:
        scaled, frame = _true_size(stored, preparation.grid, preparation.spacing, low=low, high=high)
        foreground = foreground_places(scaled.numpy(), low=0.0, high=1.0)
    darkest, brightest = (float(extreme) for extreme in torch.aminmax(scaled))
    axes = file_axes(preparation.grid)
    in_file, zero, one = sixteen_bits(scaled.permute(axes), darkest=darkest, brightest=brightest)
    voxels = in_file.transpose(np.argsort(axes))
    header, content = file_parts(voxels)
    digest = hashlib.sha256(header)
    digest.update(content.data)
    entry = {
        "subject": candidate.subject,
        "session": candidate.session,
        "source": candidate.source,
        "source_sha256": stored.digest,
        "file": volume_file(candidate.source),
        "sha256": digest.hexdigest(),
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


def sixteen_bits(scaled: Tensor, *, darkest: float, brightest: float) -> tuple[np.ndarray, float, float]:
    """Scaled intensities in 16 bits, and the values there that stand for 0 and for 1.

    Args:
        scaled: float32, on the CPU, of any strides; its memory may be used. The result is contiguous.
        darkest, brightest: its extremes.

    Raises:
        ValueError: not finite, constant, or too wide a range; the message completes "the volume …".
    """
    if not (math.isfinite(darkest) and math.isfinite(brightest)):
        raise ValueError("has intensities too far apart to be scaled")
    if darkest == brightest:
        raise ValueError(f"is constant once it is on the grid: {darkest:g} of its range everywhere")
    bottom = min(darkest, 0.0)
    # A power of two: scaling back is then exact in float32, on any device.
    steps = 2.0 ** math.floor(math.log2(65534 / (max(brightest, 0.0) - bottom)))
    if steps >= COARSEST:
        low = -32768.0 - round(bottom * steps)
        stored = scaled.mul_(steps).round_().add_(low).to(torch.int16, memory_format=torch.contiguous_format)
        return stored.numpy(), low, low + steps
    if max(brightest, -darkest) > LARGEST_FLOAT16:
        raise ValueError(
            f"has outliers of {max(brightest, -darkest):.3g} times the range from its percentile 0 to 99.5, more than "
            "16 bits hold: clip them"
        )
    return scaled.to(torch.float16, memory_format=torch.contiguous_format).numpy(), 0.0, 1.0

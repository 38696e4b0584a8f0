"""Voxels outside the brain set to zero, by a mask that the manifest names or by the MNI-152 template's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from decovae.data.file_bytes import printable
from decovae.data.nifti import Stored, read_nifti
from decovae.data.volumes import Affine, Shape, in_memory_order, times
from decovae.errors import InputError

SAME_PLACE = 1e-3
"""Of a voxel, in the entries of an affine: headers round them, and no more."""
LEAST_TISSUE = 0.5
"""Of the template's brain: the share where a volume in MNI space is brighter than a tenth of its range, at least."""
BRIGHT = 0.1


def named_mask(path: Path, stored: Stored, *, limit: int) -> np.ndarray:
    """The voxels of a mask's file that are neither zero nor NaN, `(D, H, W)`, bool.

    Slope and intercept are rounded in a file's header: of integers, the one nearest to what they make zero is zero.

    Args:
        path: the mask.
        stored: the volume that it is for.
        limit: as for `read_nifti`.

    Raises:
        InputError: it cannot be read, lies elsewhere than the volume, is empty, or leaves nothing out.
    """
    mask = read_nifti(path, limit=limit)
    if mask.voxels.shape != stored.voxels.shape:
        there, wanted = times(mask.voxels.shape), times(stored.voxels.shape)
        raise InputError(f"The mask {printable(path)} is {there} voxels (in RAS axes), the volume {wanted}.")
    voxel = np.linalg.norm(np.array(stored.affine)[:3, :3], axis=0).min()
    if np.abs(np.subtract(mask.affine, stored.affine)).max() > SAME_PLACE * voxel:
        raise InputError(
            f"The mask {printable(path)} lies elsewhere than the volume (another affine): resample it to the volume."
        )
    exact = mask.voxels.dtype.kind == "f"
    inside: np.ndarray = mask.voxels != (mask.zero if exact else float(round(mask.zero)))
    if exact:
        inside &= ~np.isnan(mask.voxels)
    if not inside.any():
        raise InputError(f"The mask {printable(path)} is empty: no voxel of it differs from zero.")
    if inside.all():
        raise InputError(f"The mask {printable(path)} leaves nothing out: no voxel of it is zero.")
    return inside


def mni_mask(stored: Stored) -> np.ndarray:
    """The voxels of a volume in MNI space that lie in the template's brain, `(D, H, W)`, bool.

    Raises:
        ValueError: the volume is too dark there to be in MNI space, or no voxel is a number; the message completes "the
            volume …".
    """
    depth, height, width = stored.voxels.shape
    mask, share = _template_brain((depth, height, width), stored.affine)
    inside = stored.voxels[mask]
    if inside.size:
        # A few outliers must not set the scale, nor must a background of another value than zero, NaN even.
        sample = in_memory_order(stored.voxels)[:: max(stored.voxels.size >> 16, 1)].astype(np.float64)
        sample = sample[np.isfinite(sample)]
        if not sample.size:
            raise ValueError("holds NaN or infinite intensities")
        low, high = np.percentile(sample, (0.5, 99.5)).tolist()
        low, high = (high, low) if stored.inverted else (low, high)
        edge = low + BRIGHT * (high - low)
        bright = np.count_nonzero(inside < edge if stored.inverted else inside > edge)
        share *= bright / inside.size
    if share < LEAST_TISSUE:
        raise ValueError(
            f"is not in MNI space: it holds tissue in {share:.0%} of the template's brain; register it first, or give "
            "it a mask of its own"
        )
    return mask


def masked(stored: Stored, inside: np.ndarray) -> np.ndarray:
    """A volume's voxels with what stands for an intensity of 0 wherever `inside` is False."""
    voxels = stored.voxels
    dtype = voxels.dtype
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not (stored.zero.is_integer() and limits.min <= stored.zero <= limits.max):
            dtype = np.result_type(dtype, np.float32)
    # In the file's order of voxels: what follows reads them so.
    result: np.ndarray = np.where(inside.T, voxels.T, np.array(stored.zero, dtype)).T
    return result


@lru_cache(maxsize=2)
def _template_brain(shape: Shape, affine: Affine) -> tuple[np.ndarray, float]:
    """The template's brain in the voxels of a volume, and the share of it that they cover."""
    from nilearn import datasets  # here, not above: seconds that only this mask needs
    from scipy import ndimage

    template = datasets.load_mni152_brain_mask(resolution=1)
    brain = np.asarray(template.dataobj, dtype=np.float32)
    matrix = np.linalg.solve(template.affine, np.array(affine))
    mask: np.ndarray = ndimage.affine_transform(brain, matrix, output_shape=shape, order=1) > 0.5
    mask = np.asfortranarray(mask)
    voxel = abs(np.linalg.det(matrix))
    return mask, min(np.count_nonzero(mask) * voxel / np.count_nonzero(brain), 1.0)

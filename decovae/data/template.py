"""The MNI-152 template's tissue maps on any grid over UK Biobank's field of view."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from decovae.data.resample import resample_crop
from decovae.data.volumes import Shape

FULL_SHAPE: Shape = (182, 218, 182)
"""UK Biobank's MNI-152 grid at 1 mm; a smaller grid covers the same box with larger voxels."""

BOX_LOW = (-91.5, -126.5, -72.5)
"""The box's left, posterior, inferior corner in MNI millimetres. UK Biobank stores the same box from right to left."""

BOX_SIZE = (182.0, 218.0, 182.0)
"""Millimetres, along the RAS axes."""


def cohort_affine(shape: Shape) -> np.ndarray:
    """The `(4, 4)` affine from voxels of a grid of `shape` over the box to MNI millimetres, in RAS orientation.

    For the full grid this is UK Biobank's `[-1 0 0 90; 0 1 0 -126; 0 0 1 -72]` with the first axis turned round:
    `[1 0 0 -91; 0 1 0 -126; 0 0 1 -72]`.
    """
    voxel = np.divide(BOX_SIZE, shape)
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = np.add(BOX_LOW, voxel / 2)
    return affine


@lru_cache(maxsize=2)
def tissue_maps(shape: Shape) -> torch.Tensor:
    """`(4, *shape)`, float32, in [0, 1]: the shares of CSF, grey and white matter, and the template's own texture.

    The shares sum to 1 in the brain and to 0 outside. The texture is what of the T1 template the best mixture of three
    tissue intensities leaves over, in units of its white matter.
    """
    full = _full_maps()
    return torch.stack([resample_crop(each, grid=shape, corner=(0, 0, 0), size=shape) for each in full])


@lru_cache(maxsize=1)
def _full_maps() -> np.ndarray:
    from nilearn import datasets  # here, not above: two seconds that only the making of a subject needs

    t1, grey, white = (
        _in_box(load(resolution=1))
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    )
    brain = (t1 > 0).astype(np.float32)
    scale = np.maximum(grey + white, 1.0)  # the two maps overshoot a little at their common border
    grey, white = brain * grey / scale, brain * white / scale
    shares = np.stack([brain - grey - white, grey, white])
    flat = shares.reshape(3, -1).astype(np.float64)
    mixture = np.linalg.solve(flat @ flat.T, flat @ t1.ravel())  # least squares: 7 million equations, 3 unknowns
    texture = (t1 - np.tensordot(mixture, shares, 1)) / mixture[2]
    return np.concatenate([shares, texture[None]]).astype(np.float32)


def _in_box(image: Any) -> np.ndarray:
    """The part of a 1 mm RAS template inside the box. Their voxels coincide, so nothing is resampled."""
    corner = np.round(np.subtract(cohort_affine(FULL_SHAPE)[:3, 3], image.affine[:3, 3])).astype(int)
    where = tuple(slice(start, start + size) for start, size in zip(corner, FULL_SHAPE, strict=True))
    return np.asarray(image.dataobj[where], dtype=np.float32)

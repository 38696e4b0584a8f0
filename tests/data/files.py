"""Volumes written to disk for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform

ORIENTATIONS = ("RAS", "LPS", "LAS", "PIR", "SLA", "IRP")


def noise(shape: tuple[int, ...] = (12, 14, 10), seed: int = 0) -> np.ndarray:
    """Positive float32 noise."""
    return np.random.default_rng(seed).gamma(2.0, 100.0, shape).astype(np.float32)


def write(path: Path, volume: Any, *, axes: str = "RAS", affine: Any = None, kind: Any = nib.Nifti1Image) -> Path:
    """Write `volume`, given in RAS axes, with its voxels stored along `axes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = kind(volume, np.diag([1.5, 1.0, 2.0, 1.0]) if affine is None else affine)
    image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))).to_filename(path)
    return path


def write_integers(path: Path, stored: np.ndarray, *, slope: float, intercept: float, axes: str = "RAS") -> Path:
    """Write integers, given in RAS axes, that stand for `slope * stored + intercept`."""
    image = nib.Nifti1Image(stored, np.eye(4)).as_reoriented(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes)))
    image.header.set_slope_inter(slope, intercept)  # set after the data, nibabel stores them beside unchanged integers
    image.to_filename(path)
    return path

"""A frame says where voxels lie, also after resizing."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from decovae.data.cohort import FULL_SHAPE, cohort_affine
from decovae.data.frame import Frame
from decovae.data.resample import resample_crop
from decovae.data.volumes import affine_rows

TURNED = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=0.3, y=0.2, x=-0.4) * 1.2, (3, 4, 5))


def test_every_grid_of_the_cohort_is_the_full_one_resized() -> None:
    full = Frame(FULL_SHAPE, affine_rows(cohort_affine(FULL_SHAPE)))
    for grid in ((64, 72, 64), (128, 256, 128), (300, 7, 182)):
        np.testing.assert_allclose(full.on_grid(grid).matrix, cohort_affine(grid))


def test_resized_voxels_lie_where_the_frame_says() -> None:
    frame = Frame((20, 24, 16), affine_rows(TURNED))
    voxels = np.stack(np.meshgrid(*map(np.arange, frame.shape), indexing="ij"), axis=-1)
    places = nib.affines.apply_affine(frame.matrix, voxels)
    grid = (30, 12, 16)
    resized = frame.on_grid(grid)
    expected = nib.affines.apply_affine(
        resized.matrix, np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    )
    inside = (slice(3, -3),) * 3  # at the ends resizing clamps
    for axis in range(3):
        found = resample_crop(places[..., axis], grid=grid, corner=(0, 0, 0), size=grid).numpy()
        np.testing.assert_allclose(found[inside], expected[..., axis][inside], atol=1e-4)


def test_there_and_back_is_the_same_place() -> None:
    frame = Frame((182, 218, 182), affine_rows(TURNED))
    again = frame.on_grid((128, 256, 128)).on_grid(frame.shape)
    assert again.shape == frame.shape
    np.testing.assert_allclose(again.matrix, frame.matrix, atol=1e-12)


@pytest.mark.parametrize("grid", [(20, 24, 16), (7, 60, 33)])
def test_true_size_keeps_the_middle_and_has_the_spacing(grid: tuple[int, int, int]) -> None:
    frame = Frame((20, 24, 16), affine_rows(TURNED))  # 1.2 mm
    for spacing in ((0.7, 1.0, 3.0), (1.2, 1.2, 1.2)):
        fitted = frame.true_size(grid, spacing)
        np.testing.assert_allclose(np.linalg.norm(fitted.matrix[:3, :3], axis=0), spacing)
        middle = [(np.array(each.shape) - 1) / 2 for each in (frame, fitted)]
        there, ours = (nib.affines.apply_affine(f.matrix, m) for f, m in zip((frame, fitted), middle, strict=True))
        off = np.abs(np.linalg.solve(frame.matrix[:3, :3], ours - there))  # in voxels
        assert (off < (0.5 + 1e-9 if spacing[0] == 1.2 else 1e-9)).all()


def test_a_frame_survives_json_exactly() -> None:
    frame = Frame((5, 6, 7), affine_rows(TURNED))
    assert Frame.from_dict(json.loads(json.dumps(frame.as_dict()))) == frame


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"shape": [1, 2], "affine": TURNED},
        {"shape": [1, 2, 3], "affine": TURNED[:3]},
        {"shape": [1, 2, 3], "affine": TURNED * np.nan},
        {"shape": [1, 2, 3], "affine": "no"},
    ],
)
def test_what_is_no_frame_is_refused(entry: dict) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Frame.from_dict(entry)

"""Outside the mask nothing is left, and a mask of something else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decovae.data.nifti import read_nifti
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.mask import masked, mni_mask
from decovae.preparation.volume import Preparation, prepare_volume
from tests.data.files import noise, write, write_integers

SHAPE = (12, 14, 10)
BY_COLUMN = Preparation(grid=SHAPE, mask="column")


@pytest.fixture
def inside() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9, 4:11, 2:8] = 1
    return mask


def prepared_scaled(volume: Path, mask: Path | None, preparation: Preparation = BY_COLUMN) -> np.ndarray:
    voxels, entry = prepare_volume(Candidate("s", "", volume, volume.name, mask=mask), preparation)
    return (voxels - entry["low"]) / (entry["high"] - entry["low"])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_outside_is_zero_and_inside_is_scaled_by_what_is_left(tmp_path: Path, inside: np.ndarray, axes: str) -> None:
    volume = noise(SHAPE) + 50
    found = prepared_scaled(
        write(tmp_path / "a.nii", volume), write(tmp_path / "mask.nii.gz", inside * np.uint8(7), axes=axes)
    )
    kept = np.where(inside, volume, 0).astype(float)
    np.testing.assert_allclose(found, kept / np.percentile(kept, 99.5), atol=2**-12)


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, -100.0), (0.5, 3.3), (-1.0, 5.0)])
def test_zero_is_that_of_the_scanner_not_of_the_file(
    tmp_path: Path, inside: np.ndarray, slope: float, intercept: float
) -> None:
    stored = np.clip(noise(SHAPE), 0, 250).astype(np.uint8)
    volume = write_integers(tmp_path / "a.nii", stored, slope=slope, intercept=intercept)
    meant = np.where(inside, slope * stored.astype(float) + intercept, 0)
    low, high = np.percentile(meant, (0, 99.5))
    found = prepared_scaled(volume, write(tmp_path / "mask.nii", inside, affine=np.eye(4)))
    np.testing.assert_allclose(found, (meant - low) / (high - low), atol=2**-12)


def test_what_is_no_number_may_lie_outside(tmp_path: Path, inside: np.ndarray) -> None:
    volume = noise(SHAPE)
    background = np.where(inside, volume, np.nan)
    path, mask = write(tmp_path / "a.nii", background), write(tmp_path / "mask.nii", np.where(inside, 1, np.nan))
    expected = write(tmp_path / "b.nii", np.where(inside, volume, 0))
    np.testing.assert_array_equal(prepared_scaled(path, mask), prepared_scaled(expected, mask))
    with pytest.raises(InputError, match="NaN"):
        prepared_scaled(write(tmp_path / "c.nii", np.where(volume > 300, np.nan, volume)), mask)


def bad_masks(inside: np.ndarray) -> dict[str, tuple[Any, Any, str]]:
    own = np.diag([1.5, 1.0, 2.0, 1.0])
    moved = own.copy()
    moved[1, 3] = 0.5
    return {
        "other voxels": (inside[1:], own, "11×14×10"),
        "other place": (inside, moved, "elsewhere"),
        "empty": (inside * 0, own, "empty"),
    }


@pytest.mark.parametrize("name", ["other voxels", "other place", "empty"])
def test_a_mask_of_something_else_is_refused(tmp_path: Path, inside: np.ndarray, name: str) -> None:
    mask, affine, words = bad_masks(inside)[name]
    with pytest.raises(InputError, match=words):
        prepared_scaled(write(tmp_path / "a.nii", noise(SHAPE)), write(tmp_path / "mask.nii", mask, affine=affine))


def test_a_missing_mask_is_refused(tmp_path: Path) -> None:
    volume = write(tmp_path / "a.nii", noise(SHAPE))
    with pytest.raises(InputError, match="no mask"):
        prepared_scaled(volume, None)
    with pytest.raises(InputError, match="gone"):
        prepared_scaled(volume, tmp_path / "gone.nii")


def template_head(path: Path, *, shift: float = 0.0) -> tuple[Path, np.ndarray]:
    """A brain of the template's shape in a bright rim, which the mask should take away, at 4 mm."""
    datasets = pytest.importorskip("nilearn.datasets")
    ndimage = pytest.importorskip("scipy.ndimage")
    image = datasets.load_mni152_brain_mask(resolution=4)
    brain = np.asarray(image.dataobj) > 0
    rim = ndimage.binary_dilation(brain, iterations=3) & ~ndimage.binary_dilation(brain, iterations=2)
    head = np.where(brain, 500 + noise(brain.shape) / 10, np.where(rim, 800, 0)).astype(np.int16)
    affine = image.affine.copy()
    affine[:3, 3] += shift
    return write(path, head, affine=affine, axes="LPS"), brain


def test_the_templates_brain_is_what_is_kept(tmp_path: Path) -> None:
    path, brain = template_head(tmp_path / "a.nii.gz")
    stored = read_nifti(path)
    mask = mni_mask(stored)
    assert (mask != brain).mean() < 0.02  # two ways from 1 mm to 4 mm
    kept = masked(stored, mask)
    assert not (kept == 800).any()
    assert (kept[mask] == stored.voxels[mask]).all()


def test_what_is_not_in_mni_space_is_refused(tmp_path: Path) -> None:
    path, _ = template_head(tmp_path / "a.nii.gz", shift=60.0)
    with pytest.raises(InputError, match=r"a\.nii\.gz is not in MNI space"):
        prepared_scaled(path, None, Preparation(grid=SHAPE, mask="mni"))
    with pytest.raises(ValueError, match="0% of the template's brain"):
        mni_mask(read_nifti(template_head(tmp_path / "b.nii.gz", shift=500.0)[0]))


def test_a_masks_zero_is_rounded_in_its_header(tmp_path: Path, inside: np.ndarray) -> None:
    volume = noise(SHAPE) + 50
    mask = write_integers(tmp_path / "mask.nii", 3 + inside, slope=0.1, intercept=-0.3)
    found = prepared_scaled(write(tmp_path / "a.nii", volume, affine=np.eye(4)), mask)
    assert not found[~inside.astype(bool)].any()
    assert found[inside.astype(bool)].all()


def test_a_mask_that_leaves_nothing_out_is_refused(tmp_path: Path) -> None:
    volume, mask = write(tmp_path / "a.nii", noise(SHAPE)), write(tmp_path / "mask.nii", np.ones(SHAPE, np.uint8))
    with pytest.raises(InputError, match="leaves nothing out"):
        prepared_scaled(volume, mask)

"""A prepared volume is what training on its file would see, in 16 bits."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decovae.data.nifti import open_nifti
from decovae.data.patches import load_volume
from decovae.data.store import open_store
from decovae.data.store_index import canonical, record_of
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.volume import Preparation, Prepared, prepare_volume
from decovae.preparation.writer import finish_store, write_volume
from tests.data.files import ORIENTATIONS, noise, write, write_integers

GRID = (9, 16, 11)
RESIZED = Preparation(grid=GRID)


def candidate(path: Path, **fields: Any) -> Candidate:
    return Candidate("sub-1", "ses-1", path, path.name, **fields)


def scaled(prepared: Prepared) -> np.ndarray:
    low, high = prepared.entry["low"], prepared.entry["high"]
    return (prepared.voxels.astype(np.float64) - low) / (high - low)


def step(prepared: Prepared) -> float:
    return 1 / (prepared.entry["high"] - prepared.entry["low"])


@given(
    dtype=st.sampled_from(["uint8", "int16", ">i2", "uint16", "int32", "float32", ">f8"]),
    axes=st.sampled_from(ORIENTATIONS),
    slope=st.sampled_from([1.0, 0.37, -2.0]),
    seed=st.integers(0, 100),
    grid=st.tuples(*[st.integers(4, 20)] * 3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_what_training_on_the_folder_sees(
    tmp_path: Path, dtype: str, axes: str, slope: float, seed: int, grid: tuple[int, int, int]
) -> None:
    folder = tmp_path / "volumes"
    file = folder / "a.nii"
    stored = np.minimum(noise((12, 14, 10), seed) / 10, 250).astype(dtype)
    folder.mkdir(exist_ok=True)
    write_integers(file, stored, slope=slope, intercept=7, axes=axes)
    from_file = open_nifti(folder, patch=(1, 1, 1))
    prepared = prepare_volume(candidate(file), Preparation(grid=grid))
    expected = load_volume(from_file, 0, grid)[0].numpy()
    assert prepared.voxels.dtype == np.int16
    assert step(prepared) <= 2**-11
    np.testing.assert_allclose(scaled(prepared), expected, atol=step(prepared) / 2, rtol=1e-12)
    ours, theirs = record_of(prepared.entry), from_file.records[0]
    assert (ours.shape, ours.affine, ours.foreground) == (theirs.shape, theirs.affine, theirs.foreground)


def test_through_a_store_it_reads_as_it_was_made(tmp_path: Path) -> None:
    prepared = prepare_volume(candidate(write(tmp_path / "a.nii.gz", noise())), RESIZED)
    write_volume(tmp_path / "store", prepared)
    finish_store(tmp_path / "store", [prepared.entry], {}, grid=GRID)
    store = open_store(tmp_path / "store")
    assert np.array_equal(store.read(0), prepared.voxels)
    torch.testing.assert_close(load_volume(store, 0, GRID)[0].numpy(), scaled(prepared).astype(np.float32))


def test_air_is_exactly_zero(tmp_path: Path) -> None:
    volume = noise()
    volume[:, :, :5] = 0
    prepared = prepare_volume(candidate(write(tmp_path / "a.nii", volume)), Preparation(grid=(12, 14, 10)))
    assert (scaled(prepared)[:, :, :5] == 0).all()


def test_scaling_back_is_exact_in_single_precision(tmp_path: Path) -> None:
    """So that a CPU and a GPU, by division or by a product, see the same bits."""
    prepared = prepare_volume(candidate(write(tmp_path / "a.nii", noise())), RESIZED)
    single = torch.from_numpy(prepared.voxels).float().sub(prepared.entry["low"]).mul(step(prepared)).numpy()
    assert np.array_equal(single.astype(np.float64), scaled(prepared))


def test_the_bytes_depend_on_nothing_else(tmp_path: Path) -> None:
    """Neither on threads, nor on the file's order of axes, nor on what was prepared before."""
    volume = noise((60, 70, 50))
    first = write(tmp_path / "a.nii.gz", volume)
    turned = write(tmp_path / "b.nii", volume, axes="PIR")
    grid = Preparation(grid=(48, 96, 40))
    threads = torch.get_num_threads()
    try:
        results = []
        for count, path in ((1, first), (2, first), (1, turned), (4, first)):
            torch.set_num_threads(count)
            results.append(prepare_volume(candidate(path), grid))
    finally:
        torch.set_num_threads(threads)
    assert len({result.entry["sha256"] for result in results}) == 1
    assert all(np.array_equal(result.voxels, results[0].voxels) for result in results)
    assert canonical(results[0].entry) == canonical(results[1].entry) == canonical(results[3].entry)


def test_the_entry_is_json_that_survives(tmp_path: Path) -> None:
    path = write(tmp_path / "Müller 1.nii", noise())
    entry = prepare_volume(candidate(path, columns={"age": "63", "sex": "♀"}), RESIZED).entry
    assert json.loads(canonical(entry)) == entry
    record = record_of(entry)
    assert (record.subject, record.session, record.source) == ("sub-1", "ses-1", "Müller 1.nii")
    assert record.columns == {"age": "63", "sex": "♀"}


@pytest.mark.parametrize("brightest", [20.0, 1e3, 6e4])
def test_a_range_too_wide_for_16_linear_bits_is_floating_point(tmp_path: Path, brightest: float) -> None:
    volume = np.linspace(0, 1, 12 * 14 * 10, dtype=np.float32).reshape(12, 14, 10)
    volume[5, 5, 5] = brightest
    prepared = prepare_volume(candidate(write(tmp_path / "a.nii", volume)), Preparation(grid=(12, 14, 10)))
    assert prepared.voxels.dtype == (np.int16 if brightest < 31 else np.float16)
    error = np.abs(scaled(prepared) - volume / np.percentile(volume.astype(float), 99.5))
    assert (error <= np.maximum(2**-11 * np.abs(scaled(prepared)), 2**-12)).all()


BAD = {
    "constant": np.full((4, 5, 6), 3, np.int16),
    "all zero": np.zeros((4, 5, 6), np.float32),
    "NaN": np.where(np.arange(120).reshape(4, 5, 6) == 7, np.nan, 1.0).astype(np.float32),
    "infinite": np.where(np.arange(120).reshape(4, 5, 6) == 7, -np.inf, 1.0).astype(np.float32),
    "outliers": np.where(np.arange(480).reshape(8, 10, 6) == 7, 1e9, noise((8, 10, 6))).astype(np.float32),
    "float32's whole range": np.array([-3e38, 3e38, 1, 2] * 30, np.float32).reshape(4, 5, 6),
    "float64's whole range": np.array([-1e308, 1.7e308, 1, 2] * 30).reshape(4, 5, 6),
    "denormal": np.where(np.arange(480) == 7, 1e30, np.arange(480) % 9 * 2e-45).astype(np.float32).reshape(8, 10, 6),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("fit", ["resize", "resample"])
def test_what_cannot_be_scaled_is_one_sentence(tmp_path: Path, name: str, fit: Any) -> None:
    path = write(tmp_path / "bad one.nii", BAD[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"bad one\.nii [^\n]*\.$"):
            prepare_volume(candidate(path), Preparation(grid=GRID, fit=fit))


def test_a_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", noise((40, 40, 40)))
    with pytest.raises(InputError, match=r"a\.nii\.gz"):
        prepare_volume(candidate(path), Preparation(grid=GRID, limit_gib=1e-4))


@pytest.mark.parametrize(
    "options",
    [
        {"grid": (0, 1, 1)},
        {"grid": (10**6, 10**6, 10**6)},
        {"spacing": (1.0, -1.0, 1.0)},
        {"spacing": (1.0, math.nan, 1.0)},
        {"limit_gib": 0.0},
    ],
)
def test_options_that_nothing_can_be_prepared_with(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options)).replace("_", "-")):
        Preparation(**options)


TURNED = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=0.3, y=0.2, x=-0.4) @ np.diag([1.2, 0.8, 2.5]), (3, 4, 5))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.4, 0.8, 1.7)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_resampled_voxels_lie_where_the_index_says(tmp_path: Path, spacing: Any, axis: int) -> None:
    """A volume whose intensity is a coordinate in the world still is one."""
    shape = (20, 24, 16)
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    volume = nib.affines.apply_affine(TURNED, indices)[..., axis]
    path = write(tmp_path / "a.nii", volume, affine=TURNED)
    grid = (14, 12, 50)
    prepared = prepare_volume(candidate(path), Preparation(grid=grid, fit="resample", spacing=spacing))
    affine = np.array(prepared.entry["affine"])
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)
    assert prepared.entry["shape"] == list(grid)
    targets = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1)
    places = nib.affines.apply_affine(affine, targets)
    within = nib.affines.apply_affine(np.linalg.inv(TURNED), places)
    margin = np.maximum(np.divide(spacing, (1.2, 0.8, 2.5)), 1)
    inside = ((within >= margin) & (within <= np.array(shape) - 1 - margin)).all(-1)
    outside = ((within < -0.5) | (within > np.array(shape) - 0.5)).any(-1)
    low, high = volume.min(), np.percentile(volume, 99.5)
    assert inside.any()
    assert outside.any()
    expected = (places[..., axis] - low) / (high - low)
    np.testing.assert_allclose(scaled(prepared)[inside], expected[inside], atol=2e-3)  # of 30 mm: 1/16 mm
    assert (scaled(prepared)[outside] == 0).all()


def test_resampling_to_the_files_own_voxels_only_crops_and_pads(tmp_path: Path) -> None:
    volume = noise((12, 9, 10))
    path = write(tmp_path / "a.nii", volume)
    fitted = Preparation(grid=(8, 12, 10), fit="resample", spacing=(1.5, 1.0, 2.0))
    prepared = prepare_volume(candidate(path), fitted)
    same = prepare_volume(candidate(path), Preparation(grid=(12, 9, 10)))
    np.testing.assert_allclose(scaled(prepared)[:, 2:11], scaled(same)[2:10], atol=step(same))
    assert (scaled(prepared)[:, [0, 1, 11]] == 0).all()
    np.testing.assert_array_equal(np.array(prepared.entry["affine"])[:3, 3], [3.0, -2.0, 0.0])


def test_a_mask_that_was_not_named_is_missed_before_the_volume_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.nii has no mask: the manifest's column `mask` is empty\.$"):
        prepare_volume(candidate(tmp_path / "none.nii"), Preparation(grid=GRID, mask="column"))


def test_which_side_is_left_is_not_guessed(tmp_path: Path) -> None:
    nib.Nifti1Image(noise(), None).to_filename(tmp_path / "scan.nii")
    assert len(open_nifti(tmp_path, patch=(4, 4, 4)).records) == 1
    with pytest.raises(InputError, match=r"does not say which side is left .*where nibabel's guess is right"):
        prepare_volume(candidate(tmp_path / "scan.nii"), RESIZED)
    image = nib.load(tmp_path / "scan.nii")
    nib.save(nib.Nifti1Image(image.dataobj, image.affine), tmp_path / "told.nii")  # as the sentence advises
    told, guessed = (load_volume_of(tmp_path, name) for name in ("told", "scan"))
    np.testing.assert_array_equal(told, guessed)
    assert prepare_volume(candidate(tmp_path / "told.nii"), RESIZED).voxels.shape == GRID


def load_volume_of(folder: Path, subject: str) -> np.ndarray:
    volumes = open_nifti(folder, patch=(4, 4, 4))
    (index,) = (index for index, record in enumerate(volumes.records) if record.subject == subject)
    return volumes.read(index)

"""NIfTI files of every kind give the same voxels in RAS axes, without a conversion of the whole."""

from __future__ import annotations

import gzip
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from decovae.data.nifti import open_nifti, open_usable_nifti, read_nifti
from decovae.data.patches import load_volume
from decovae.errors import InputError
from tests.data.files import ORIENTATIONS, noise, write, write_integers

PATCH = (4, 4, 4)


def scaled(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0, 99.5))
    return (values - low) / (high - low)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_any_orientation_reads_as_ras(tmp_path: Path, axes: str, suffix: str) -> None:
    volume = noise()
    path = write(tmp_path / f"scan{suffix}", volume, axes=axes)
    assert nib.aff2axcodes(nib.load(path).affine) == tuple(axes)
    volumes = open_nifti(tmp_path, patch=PATCH)
    np.testing.assert_array_equal(volumes.read(0), volume)
    assert volumes.records[0].shape == volume.shape
    assert volumes.records[0].source == str(path)


def test_agrees_with_nibabel_on_an_oblique_scan(tmp_path: Path) -> None:
    turn = nib.eulerangles.euler2mat(z=0.3, y=2.0, x=-0.4)
    path = write(tmp_path / "scan.nii.gz", noise(), affine=nib.affines.from_matvec(turn * 1.2, (3, 4, 5)))
    expected = nib.as_closest_canonical(nib.load(path))
    volumes = open_nifti(tmp_path, patch=PATCH)
    np.testing.assert_array_equal(volumes.read(0), expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volumes.records[0].affine, expected.affine, atol=1e-5)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_the_affine_is_that_of_the_turned_voxels(tmp_path: Path, axes: str) -> None:
    affine = nib.affines.from_matvec(np.diag([1.5, 1.0, 2.0]), (-30, 12, 7))
    write(tmp_path / "scan.nii", noise(), axes=axes, affine=affine)
    for _ in range(2):  # the second time from the cache
        np.testing.assert_allclose(open_nifti(tmp_path, patch=PATCH).records[0].affine, affine)


@pytest.mark.parametrize("slope", [0.5, -3.0])
@pytest.mark.parametrize("axes", ["RAS", "PIR"])
def test_slope_and_intercept_do_not_change_what_is_trained_on(tmp_path: Path, slope: float, axes: str) -> None:
    stored = (noise() * 10).astype(np.int16)
    path = write_integers(tmp_path / "scan.nii", stored, slope=slope, intercept=-70.0, axes=axes)
    real = nib.as_closest_canonical(nib.load(path)).get_fdata()
    np.testing.assert_allclose(real, stored * slope - 70.0)
    volumes = open_nifti(tmp_path, patch=PATCH)
    assert volumes.read(0).dtype == np.int16, "nothing is converted before the crop"
    np.testing.assert_allclose(load_volume(volumes, 0, stored.shape)[0], scaled(real), atol=1e-5)


def test_scaling_maps_the_percentiles_to_0_and_1_and_does_not_clip(tmp_path: Path) -> None:
    volume = noise((20, 20, 20))
    write(tmp_path / "scan.nii", volume)
    volumes = open_nifti(tmp_path, patch=PATCH)
    image = load_volume(volumes, 0, volume.shape)
    assert image.shape == (1, 20, 20, 20)
    assert image.dtype == torch.float32
    assert image.min() == 0
    assert image.max() > 1
    assert torch.quantile(image, 0.995).item() == pytest.approx(1, abs=1e-5)


def test_uncompressed_files_are_mapped_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii", noise(), axes="LPS")
    base = read_nifti(path)[0]
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("dtype", ["uint8", ">i2", "<u2", ">f4", "<f8"])
def test_stored_types_and_byte_orders(tmp_path: Path, dtype: str) -> None:
    volume = noise().astype(dtype)
    header = nib.Nifti1Header(endianness=dtype[0] if dtype[0] in "<>" else "<")
    header.set_data_dtype(volume.dtype)
    nib.Nifti1Image(volume, np.eye(4), header).to_filename(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(open_nifti(tmp_path, patch=PATCH).read(0), volume)


def test_nifti_2_and_a_trailing_axis_of_one(tmp_path: Path) -> None:
    volume = noise()
    write(tmp_path / "a.nii", volume, kind=nib.Nifti2Image)
    nib.Nifti1Image(volume[..., None], np.eye(4)).to_filename(tmp_path / "b.nii.gz")
    volumes = open_nifti(tmp_path, patch=PATCH)
    for index in range(2):
        np.testing.assert_array_equal(volumes.read(index), volume)


def test_a_gzipped_file_named_nii_is_read(tmp_path: Path) -> None:
    volume = noise()
    write(tmp_path / "scan.nii.gz", volume).rename(tmp_path / "scan.nii")
    np.testing.assert_array_equal(open_nifti(tmp_path, patch=PATCH).read(0), volume)


def test_members_of_gzip_and_zeros_behind_them_are_read(tmp_path: Path) -> None:
    volume = noise()
    content = nib.Nifti1Image(volume, np.eye(4)).to_bytes()
    members = [gzip.compress(part) for part in (content[:200], b"", content[200:5000], content[5000:])]
    (tmp_path / "scan.nii.gz").write_bytes(b"".join(members) + bytes(600))
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.nii.gz").voxels, volume)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_pairs_of_header_and_image_are_volumes(tmp_path: Path, kind: Any, end: str) -> None:
    volume = noise()
    write(tmp_path / f"scan.img{end}", volume, axes="LPS", kind=kind)
    volumes = open_nifti(tmp_path, patch=PATCH)
    assert [(record.subject, record.source) for record in volumes.records] == [
        ("scan", str(tmp_path / f"scan.img{end}"))
    ]
    np.testing.assert_array_equal(volumes.read(0), volume)
    np.testing.assert_array_equal(read_nifti(tmp_path / f"scan.hdr{end}").voxels, volume)


def test_a_qform_whose_handedness_was_not_set_counts_as_right_handed(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), np.diag([1.5, 1.0, 2.0, 1.0]))
    image.header["sform_code"], image.header["qform_code"] = 0, 1
    content = bytearray(image.header.binaryblock + bytes(4) + noise().tobytes(order="F"))
    content[76:80] = bytes(4)  # pixdim[0]
    (tmp_path / "scan.nii").write_bytes(content)
    assert read_nifti(tmp_path / "scan.nii").affine[0][0] == 1.5


def test_axes_may_be_a_little_off_right_angles(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = np.tan(np.radians(0.9))
    write(tmp_path / "scan.nii", noise(), affine=affine)
    np.testing.assert_array_equal(read_nifti(tmp_path / "scan.nii").voxels, noise())


@pytest.mark.parametrize(("slope", "intercept", "zero"), [(2.0, -100.0, 50.0), (-0.5, 3.0, 6.0), (0.0, 7.0, 0.0)])
def test_the_stored_value_of_zero(tmp_path: Path, slope: float, intercept: float, zero: float) -> None:
    image = nib.Nifti1Image(noise().astype(np.int16), np.eye(4))
    header = image.header
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, intercept, 352
    (tmp_path / "scan.nii").write_bytes(header.binaryblock + bytes(4) + noise().astype(np.int16).tobytes(order="F"))
    assert read_nifti(tmp_path / "scan.nii").zero == zero


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_digest_is_that_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"scan{suffix}", noise((40, 50, 60)))
    assert read_nifti(path, checksum=True).digest == sha256(path.read_bytes()).hexdigest()
    assert read_nifti(path).digest == ""


def test_the_digest_of_a_pair_tells_of_both_files(tmp_path: Path) -> None:
    digests = set()
    for affine, volume in ((np.eye(4), noise()), (2 * np.eye(4), noise()), (np.eye(4), noise(seed=1))):
        write(tmp_path / "scan.img", volume, affine=affine, kind=nib.Nifti1Pair)
        digests.add(read_nifti(tmp_path / "scan.img", checksum=True).digest)
    assert len(digests) == 3


def test_columns_of_the_manifest_reach_the_records(tmp_path: Path) -> None:
    write(tmp_path / "a.nii", noise())
    (tmp_path / "cohort.csv").write_text("path,age\na.nii,63\n")
    assert open_nifti(tmp_path / "cohort.csv", patch=PATCH).records[0].columns == {"age": "63"}
    assert open_nifti(tmp_path, patch=PATCH).records[0].columns == {}


def test_unusable_volumes_are_left_out_and_named_on_request(tmp_path: Path) -> None:
    for subject in ("a", "d"):
        write(tmp_path / f"{subject}.nii", noise())
    (tmp_path / "b.nii").write_bytes(b"")
    (tmp_path / "cohort.csv").write_text("path\na.nii\nb.nii\nc.nii\nd.nii\n")
    volumes, left_out = open_usable_nifti(tmp_path / "cohort.csv", patch=PATCH)
    assert [record.subject for record in volumes.records] == ["a", "d"]
    assert [(entry.subject, entry.source) for entry in left_out] == [
        ("b", str(tmp_path / "b.nii")),
        ("c", str(tmp_path / "c.nii")),
    ]
    assert "b.nii is an empty file" in left_out[0].reason
    assert "c.nii cannot be read" in left_out[1].reason
    (tmp_path / "cohort.csv").write_text("path\nb.nii\nc.nii\n")
    with pytest.raises(
        InputError, match=r"None of the 2 volumes of .*cohort\.csv can be used; of the first: .*b\.nii is"
    ):
        open_usable_nifti(tmp_path / "cohort.csv", patch=PATCH)

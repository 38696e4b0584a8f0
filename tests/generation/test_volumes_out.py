"""Samples as files: where they lie, what they say, and that viewers open them."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nilearn import datasets, image
from PIL import Image

from decovae.data.frame import Frame
from decovae.data.patches import load_volume
from decovae.data.template import cohort_affine, tissue_maps
from decovae.data.volumes import Shape, VolumeRecord, affine_rows, intensity_range
from decovae.errors import InputError
from decovae.generation.contact_sheet import central_planes, pixel_sizes, save_contact_sheet
from decovae.generation.volumes_out import is_written, nifti_bytes, read_volume, to_frame, write_sample

SOURCE: Shape = (46, 54, 46)
GRID: Shape = (32, 48, 36)


MIDDLE = (0.46, 0.54, 0.47)
"""Of the phantom, in parts of the axes."""


def frame(shape: Shape = SOURCE) -> Frame:
    return Frame(shape, affine_rows(cohort_affine(shape)))


@dataclass(frozen=True)
class OneVolume:
    volume: np.ndarray

    @property
    def records(self) -> list[VolumeRecord]:
        shape = self.volume.shape
        low, high = intensity_range(self.volume)
        return [VolumeRecord("phantom", "memory", shape, low, high, affine_rows(cohort_affine(shape)))]

    def read(self, index: int) -> np.ndarray:
        return self.volume


def phantom(shape: Shape = SOURCE) -> np.ndarray:
    """An ellipsoid off the centre with a smooth border, and a ball on one side of it: no symmetry at all."""
    axes = np.meshgrid(*[(np.arange(size) + 0.5) / size for size in shape], indexing="ij")
    head = sum(((axis - at) / size) ** 2 for axis, at, size in zip(axes, MIDDLE, (0.35, 0.4, 0.3), strict=True))
    ball = sum(((axis - at) / 0.1) ** 2 for axis, at in zip(axes, (0.6, 0.4, 0.55), strict=True))
    return (1 / (1 + np.exp(12 * (head - 1))) + 0.5 * np.exp(-ball)).astype(np.float32)


def test_the_preparation_is_undone() -> None:
    volume = phantom()
    prepared = load_volume(OneVolume(700 * volume + 30), 0, GRID)
    assert prepared.shape == (1, *GRID)
    back = to_frame(prepared, frame())
    assert back.shape == SOURCE
    assert back.dtype == np.float32
    assert np.corrcoef(back.ravel(), volume.ravel())[0, 1] > 0.998
    inside, inside_back = volume > 0.5, back > 0.5 * back.max() / volume.max()
    assert 2 * (inside & inside_back).sum() / (inside.sum() + inside_back.sum()) > 0.97
    places = np.stack(np.meshgrid(*map(np.arange, SOURCE), indexing="ij")).reshape(3, -1)
    shift = (places * (back / back.sum()).ravel()).sum(1) - (places * (volume / volume.sum()).ravel()).sum(1)
    assert np.abs(shift).max() < 0.05  # voxels
    # The place is right, not only the look: the same a voxel further, or mirrored, agrees less.
    correlation = np.corrcoef(back.ravel(), volume.ravel())[0, 1]
    for other in (*(np.roll(back, 1, axis) for axis in range(3)), *(np.flip(back, axis) for axis in range(3))):
        assert np.corrcoef(other.ravel(), volume.ravel())[0, 1] < correlation - 0.004


def test_nothing_is_darker_than_the_background() -> None:
    back = to_frame(torch.randn(1, *GRID), frame())
    assert back.min() == 0


def test_viewers_open_a_sample_over_the_template(tmp_path: Path) -> None:
    """A brain made on the grid lies, once it is a file, over the brain of nilearn's own template."""
    brain = tissue_maps(GRID)[:3].sum(0)
    write_sample(brain[None], frame(), tmp_path, "sample", label="seed 1 sample 2", facts={})
    for opened in (nib.load(tmp_path / "sample.nii.gz"), image.load_img(tmp_path / "sample.nii.gz")):
        assert opened.shape == SOURCE
        assert np.array_equal(opened.affine, cohort_affine(SOURCE).astype(np.float32))
        assert nib.aff2axcodes(opened.affine) == ("R", "A", "S")
        header = opened.header
        assert header.get_data_dtype() == np.float32
        assert header.get_xyzt_units()[0] == "mm"
        assert int(header["sform_code"]) == int(header["qform_code"]) == 4  # MNI-152
        np.testing.assert_allclose(header.get_qform(), cohort_affine(SOURCE), atol=1e-3)
    template = datasets.load_mni152_brain_mask(resolution=4)
    over = image.resample_to_img(
        tmp_path / "sample.nii.gz", template, interpolation="linear", force_resample=True, copy_header=True
    )
    mask, found = template.get_fdata() > 0, over.get_fdata() > 0.5
    assert 2 * (mask & found).sum() / (mask.sum() + found.sum()) > 0.95


def test_volumes_elsewhere_are_not_called_mni() -> None:
    turned = cohort_affine(SOURCE) @ np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 5], [0, 0, 0, 1]])
    volume = np.zeros(SOURCE, np.float32)
    content = gzip.decompress(nifti_bytes(volume, Frame(SOURCE, affine_rows(turned)), label=""))
    opened = nib.Nifti1Image.from_bytes(content)
    assert int(opened.header["sform_code"]) == 2
    assert int(opened.header["qform_code"]) == 0  # shears are not for quaternions
    np.testing.assert_allclose(opened.affine, turned, rtol=1e-6, atol=1e-5)


def test_files_are_labelled_and_reproducible(tmp_path: Path) -> None:
    volume = torch.from_numpy(phantom(GRID))[None]
    for name in ("a", "b"):
        assert not is_written(tmp_path, name)
        write_sample(volume, frame(), tmp_path, name, label="seed 42 sample 3", facts={"seed": 42})
        assert is_written(tmp_path, name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["synthetic"] is True
    assert "synthetic" in facts["notice"]
    assert facts["seed"] == 42
    description = nib.load(tmp_path / "a.nii.gz").header["descrip"].item().decode()
    assert description.startswith("synthetic: DeCo-VAE")
    assert description.endswith("seed 42 sample 3")
    assert np.array_equal(read_volume(tmp_path, "a"), to_frame(volume, frame()))
    (tmp_path / "a.nii.gz").unlink()
    assert not is_written(tmp_path, "a")
    with pytest.raises(InputError, match=r"a\.nii\.gz: is damaged"):
        read_volume(tmp_path, "a")


@pytest.mark.parametrize("label", ["x" * 200, "é" * 100])
def test_a_long_label_is_cut(label: str) -> None:
    content = gzip.decompress(nifti_bytes(np.zeros(SOURCE, np.float32), frame(), label=label))
    description = nib.Nifti1Image.from_bytes(content).header["descrip"].item()
    assert description.startswith(b"synthetic")
    assert len(description) in (78, 79)
    description.decode()


def test_planes_are_the_right_way_up() -> None:
    volume = np.zeros((4, 6, 8))
    volume[0, 3, 4] = 1  # left
    volume[2, 5, 4] = 0.8  # anterior
    volume[2, 3, 7] = 0.6  # superior
    axial, coronal, sagittal = central_planes(volume)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((6, 4), (8, 4), (8, 6))
    assert axial[2, 0] == 1
    assert axial[0, 2] == 0.8
    assert coronal[0, 2] == 0.6
    assert coronal[3, 0] == 1
    assert sagittal[3, 5] == 0.8
    assert pixel_sizes(Frame((4, 6, 8), affine_rows(np.diag([1.0, 2.0, 3.0, 1.0])))) == [(2, 1), (3, 1), (3, 2)]


@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_contact_sheet_shows_up_to_16(count: int, tmp_path: Path) -> None:
    asked = []

    def volumes():
        for number in range(count):
            asked.append(number)
            yield phantom(GRID)

    save_contact_sheet(volumes(), tmp_path / "sheet.png", frame=frame(GRID), title="of a phantom")
    assert asked == list(range(min(count, 16)))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.text["Title"] == "synthetic: of a phantom"
        assert np.asarray(sheet.convert("L")).std() > 5
    with pytest.raises(ValueError, match="at least one volume"):
        save_contact_sheet([], tmp_path / "none.png", frame=frame(), title="")

"""Each bad volume ends in one sentence that names it, before training starts."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from decovae.data.nifti import open_nifti
from decovae.errors import InputError
from tests.data.files import noise, write

PATCH = (8, 8, 8)


def image(volume: np.ndarray, **header: float) -> bytes:
    result = nib.Nifti1Image(volume, np.eye(4))
    return result.to_bytes() if not header else patched(result.to_bytes(), **header)


def patched(content: bytes, **fields: object) -> bytes:
    header = nib.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[348:]


def with_value(value: float) -> np.ndarray:
    volume = noise()
    volume[3, 4, 5] = value
    return volume


def rgb() -> np.ndarray:
    return np.zeros((9, 9, 9), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


sparse = np.zeros((12, 12, 12), np.float32)
sparse[0, 0, 0] = 1

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is an empty file"),
    "text": (lambda: b"not a volume " * 100, "is not a NIfTI file"),
    "short text": (lambda: b"no", "is not a NIfTI file"),
    "gzip of text": (lambda: gzip.compress(b"not a volume"), "is not a NIfTI file"),
    "gzipped twice": (lambda: gzip.compress(gzip.compress(image(noise()))), "is not a NIfTI file"),
    "truncated gzip": (lambda: gzip.compress(image(noise()))[:-3000], "is truncated"),
    "gzip header only": (lambda: gzip.compress(image(noise()))[:5], "is truncated"),
    "damaged gzip": (lambda: gzip.compress(image(noise()))[:-8] + b"12345678", "is truncated or damaged"),
    "gzip of a truncated file": (lambda: gzip.compress(image(noise())[:-100]), "is truncated"),
    "truncated": (lambda: image(noise())[:-1], "is truncated"),
    "header only": (lambda: image(noise())[:352], "is truncated"),
    "header that claims too much": (lambda: image(noise(), dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "is truncated"),
    "negative size": (lambda: image(noise(), dim=[3, -12, 14, 10, 1, 1, 1, 1]), "negative size"),
    "half of a pair": (lambda: image(noise(), magic=b"ni1"), "half of a .hdr/.img pair"),
    "NaN affine": (lambda: image(noise(), srow_x=[np.nan, 0, 0, 0]), "affine"),
    "flat affine": (lambda: image(noise(), srow_x=[0, 0, 0, 0]), "affine"),
    "unknown dtype": (lambda: image(noise(), datatype=9999), "unknown type, code 9999"),
    "infinite intercept": (lambda: image(noise(), scl_slope=2, scl_inter=np.inf), "damaged header"),
    "NaN offset": (lambda: image(noise(), vox_offset=np.nan), "damaged header"),
    "4D": (lambda: image(noise((12, 12, 12, 5))), "is 4D (12×12×12×5)"),
    "2D": (lambda: image(noise((12, 12))), "is 2D"),
    "no voxels": (lambda: image(np.zeros((0, 9, 9), np.float32)), "0×9×9"),
    "smaller than the patch": (lambda: image(noise((12, 7, 12))), "12×7×12 voxels (in RAS axes), smaller than"),
    "NaN": (lambda: image(with_value(np.nan)), "holds NaN or infinite"),
    "Inf": (lambda: image(with_value(-np.inf)), "holds NaN or infinite"),
    "constant": (lambda: image(np.full((9, 9, 9), 7, np.int16)), "is constant"),
    "zero": (lambda: image(np.zeros((9, 9, 9), np.float32)), "is constant"),
    "one voxel that is not zero": (lambda: image(sparse), "is constant"),
    "complex": (lambda: image(noise().astype(np.complex64)), "complex64"),
    "RGB": (lambda: image(rgb()), "RGB"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_volume_is_one_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    make, expected = BAD[name]
    path = tmp_path / "sub-07" / "scan.nii.gz"
    write(tmp_path / "sub-01" / "good.nii.gz", noise())
    path.parent.mkdir()
    path.write_bytes(make())
    with pytest.raises(InputError) as caught:
        open_nifti(tmp_path, patch=PATCH)
    message = str(caught.value)
    assert str(path) in message
    assert expected in message
    assert "\n" not in message
    assert message.endswith(".")


def test_smaller_than_the_patch_is_judged_in_ras_axes(tmp_path: Path) -> None:
    volume = noise((6, 9, 12))
    write(tmp_path / "scan.nii", volume, axes="SLA")
    assert open_nifti(tmp_path, patch=(6, 9, 12)).records[0].shape == (6, 9, 12)
    with pytest.raises(InputError, match=r"6×9×12 .* smaller than the patch 9×6×12"):
        open_nifti(tmp_path, patch=(9, 6, 12))


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_of_several_is_named_and_the_rest_counted(tmp_path: Path, workers: int) -> None:
    for index in range(12):
        write(tmp_path / f"sub-{index:02d}.nii", noise() if index % 3 == 0 else np.zeros((9, 9, 9), np.float32))
    with pytest.raises(InputError, match=r"sub-01\.nii is constant.*\(7 more volumes cannot be used either\)\.$"):
        open_nifti(tmp_path, patch=PATCH, workers=workers)


def test_a_folder_named_like_a_volume_is_only_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "odd.nii.gz" / "scan.nii", noise())
    assert [record.subject for record in open_nifti(tmp_path, patch=PATCH).records] == ["scan"]


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"scan\.nii cannot be read"):
        open_nifti(tmp_path, patch=PATCH)


def test_a_file_that_goes_bad_later_is_named_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", noise())
    volumes = open_nifti(tmp_path, patch=PATCH)
    path.unlink()
    with pytest.raises(InputError, match=r"scan\.nii\.gz cannot be read"):
        volumes.read(0)

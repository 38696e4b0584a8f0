"""Each bad volume ends in one sentence that names it, before training starts."""

from __future__ import annotations

import contextlib
import gzip
import os
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from decovae.data.nifti import open_nifti, read_nifti
from decovae.errors import InputError
from tests.data.files import noise, write
from tests.privileges import folder_of_all, unprivileged

PATCH = (8, 8, 8)


def image(volume: np.ndarray, *, kind: Any = nib.Nifti1Image, affine: Any = None, **fields: Any) -> bytes:
    """A volume's file with some fields of its header set, or one place of a field, as `pixdim_2`."""
    content = kind(volume, np.eye(4) if affine is None else affine).to_bytes()
    header = kind.header_class(content[: kind.header_class.sizeof_hdr], check=False)
    for name, value in fields.items():
        field, _, place = name.rpartition("_")
        if place.isdigit():
            header[field][int(place)] = value
        else:
            header[name] = value
    return header.binaryblock + content[header.sizeof_hdr :]


def without_sform(**fields: Any) -> bytes:
    return image(noise(), sform_code=0, **fields)


def turned_off_right_angles(degrees: float) -> np.ndarray:
    affine = np.eye(4)
    affine[:2, 1] = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    return affine


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
    "gzipped twice": (lambda: gzip.compress(gzip.compress(image(noise()))), "compressed with gzip twice"),
    "truncated gzip": (lambda: gzip.compress(image(noise()))[:-3000], "is truncated"),
    "gzip header only": (lambda: gzip.compress(image(noise()))[:5], "is truncated"),
    "damaged gzip": (lambda: gzip.compress(image(noise()))[:-8] + b"12345678", "is truncated or damaged"),
    "gzip of a truncated file": (lambda: gzip.compress(image(noise())[:-100]), "is truncated"),
    "truncated": (lambda: image(noise())[:-1], "is truncated"),
    "header only": (lambda: image(noise())[:352], "is truncated"),
    "header that claims too much": (lambda: image(noise(), dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "is truncated"),
    "a million cubed": (
        lambda: image(noise(), kind=nib.Nifti2Image, dim=[3, 10**6, 10**6, 10**6, 1, 1, 1, 1]),
        "is truncated: 4000000000000000544 bytes are promised",
    ),
    "a million cubed, compressed": (
        lambda: gzip.compress(image(noise(), kind=nib.Nifti2Image, dim=[3, 10**6, 10**6, 10**6, 1, 1, 1, 1])),
        "is truncated: 4000000000000000544 bytes are promised",
    ),
    "sizes whose product overflows": (
        lambda: image(noise(), kind=nib.Nifti2Image, dim=[3, 2**32, 2**32, 2**32, 1, 1, 1, 1]),
        "is truncated",
    ),
    "negative size": (lambda: image(noise(), dim=[3, -12, 14, 10, 1, 1, 1, 1]), "negative size"),
    "no dimensions": (lambda: image(noise(), dim_0=0), "has a damaged header: 0 dimensions"),
    "more than was promised": (
        lambda: image(np.zeros((64, 64, 64, 3), np.float32), dim_0=3),
        "holds far more than its header promises",
    ),
    "more than was promised, compressed": (
        lambda: gzip.compress(image(np.zeros((64, 64, 64, 3), np.float32), dim_0=3)),
        "holds far more than its header promises",
    ),
    "something behind gzip's end": (lambda: gzip.compress(image(noise())) + b"more", "is truncated or damaged"),
    "wrong magic": (lambda: image(noise(), magic=b"abc"), "Analyze 7.5"),
    "zero voxel size": (lambda: without_sform(qform_code=1, pixdim_2=0), "voxel sizes that cannot be: 1×0×1 mm"),
    "negative voxel size": (lambda: without_sform(qform_code=0, pixdim_3=-2), "cannot be: 1×1×-2 mm"),
    "NaN voxel size": (lambda: without_sform(qform_code=1, pixdim_1=np.nan), "cannot be: nan×1×1 mm"),
    "voxels of a kilometre": (lambda: image(noise(), affine=np.diag([1e6, 1, 1, 1])), "cannot be: 1e+06×1×1 mm"),
    "negative sform code": (lambda: image(noise(), sform_code=-1), "has a damaged header: sform_code -1"),
    "negative qform code": (lambda: without_sform(qform_code=-1), "has a damaged header: qform_code -1"),
    "unknown sform code": (lambda: image(noise(), sform_code=6), "has a damaged header: sform_code 6"),
    "micrometres": (lambda: image(noise(), xyzt_units=3 | 8), "another unit than millimetres by its header, code 3"),
    "metres": (lambda: image(noise(), kind=nib.Nifti2Image, xyzt_units=1), "code 1 (metres): convert its affine"),
    "quaternion too long": (lambda: without_sform(qform_code=1, quatern_b=3), "where its axes point"),
    "sheared": (lambda: image(noise(), affine=turned_off_right_angles(3)), "is sheared: its axes are up to 3.0° off"),
    "voxels inside the header": (lambda: image(noise(), vox_offset=16), "voxels would begin at byte 16"),
    "voxels far behind the end": (lambda: image(noise(), vox_offset=1e30), "is truncated"),
    "infinite offset": (lambda: image(noise(), vox_offset=np.inf), "damaged header"),
    "zero is nowhere": (
        lambda: image(noise(), kind=nib.Nifti2Image, scl_slope=1e-300, scl_inter=1e300),
        "slope 1e-300 and intercept 1e+300",
    ),
    "half of a pair": (lambda: image(noise(), magic=b"ni1"), "half of a .hdr/.img pair by its header"),
    "NaN affine": (lambda: image(noise(), srow_x=[np.nan, 0, 0, 0]), "affine"),
    "flat affine": (lambda: image(noise(), srow_x=[0, 0, 0, 0]), "affine"),
    "no dtype": (lambda: image(noise(), datatype=0), "unknown type, code 0"),
    "binary": (lambda: image(noise(), datatype=1), "unknown type, code 1"),
    "128 bits": (lambda: image(noise(), datatype=1536, dim=[3, 4, 4, 4, 1, 1, 1, 1]), "has voxels of"),
    "unknown dtype": (lambda: image(noise(), datatype=9999), "unknown type, code 9999"),
    "infinite intercept": (lambda: image(noise(), scl_slope=2, scl_inter=np.inf), "damaged header"),
    "NaN offset": (lambda: image(noise(), vox_offset=np.nan), "damaged header"),
    "4D": (lambda: image(noise((12, 12, 12, 5))), "is 4D (12×12×12×5): split it"),
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


def test_a_volume_above_the_limit_is_refused_before_it_is_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(image(np.zeros((128, 128, 128), np.int16))))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"scan\.nii\.gz is 0\.0 GiB, above the limit"):
        read_nifti(path, limit=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert read_nifti(path).voxels.shape == (128, 128, 128)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "scan.nii")
    with pytest.raises(InputError, match=r"scan\.nii cannot be read: it is not a file\.$"):
        read_nifti(tmp_path / "scan.nii")


def test_what_is_wrong_with_a_pair_is_said_of_the_half_that_was_asked_for(tmp_path: Path) -> None:
    pair = nib.Nifti1Pair(noise(), np.eye(4))
    pair.to_filename(tmp_path / "scan.img")
    content = (tmp_path / "scan.img").read_bytes()
    (tmp_path / "scan.img").write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"scan\.hdr is truncated"):
        read_nifti(tmp_path / "scan.hdr")
    (tmp_path / "scan.img").unlink()
    with pytest.raises(InputError, match=r"scan\.hdr cannot be read: its other half, scan\.img, is not beside it\.$"):
        read_nifti(tmp_path / "scan.hdr")
    analyze = nib.AnalyzeImage(noise(), np.eye(4))
    analyze.to_filename(tmp_path / "old.img")
    with pytest.raises(InputError, match=r"old\.img .*Analyze 7\.5, which does not say which side is left"):
        read_nifti(tmp_path / "old.img")
    write(tmp_path / "new.nii", noise()).rename(tmp_path / "new.img")
    (tmp_path / "new.hdr").write_bytes((tmp_path / "new.img").read_bytes())
    with pytest.raises(InputError, match=r"new\.img is a whole volume by its header"):
        read_nifti(tmp_path / "new.img")


def test_a_guess_of_which_side_is_left_can_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(without_sform(qform_code=0, xyzt_units=0))
    np.testing.assert_array_equal(read_nifti(path).voxels, noise()[::-1])
    with pytest.raises(InputError, match=r"scan\.nii does not say which side is left .*nibabel's guess"):
        read_nifti(path, guess=False)


def test_a_name_that_is_no_utf_8_is_named_in_a_way_that_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / "scan\udcff.nii"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"scan\\xff\.nii is an empty file: copy or export it again\.$") as caught:
        read_nifti(path)
    str(caught.value).encode("utf-8")


def test_a_file_without_permission_is_named() -> None:
    with folder_of_all() as folder:
        write(folder / "scan.nii", noise()).chmod(0)
        error = unprivileged(read_nifti, folder / "scan.nii")
        assert isinstance(error, InputError)
        assert str(error).endswith("scan.nii cannot be read: Permission denied.")


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("NaN", "Inf", "constant", "zero")])
def test_nothing_but_the_sentence_reaches_the_terminal(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(BAD[name][0]())
    caplog.set_level(0)
    with warnings.catch_warnings(), contextlib.suppress(InputError):
        warnings.simplefilter("error")
        read_nifti(path)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")

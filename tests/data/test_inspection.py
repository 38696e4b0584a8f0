"""What was learnt of a volume is forgotten with any of its files."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from decovae.data.nifti import open_nifti
from decovae.data.pairs import stamp
from tests.data.files import noise


@pytest.mark.parametrize("half", ["hdr", "img"])
def test_either_half_of_a_pair_is_noticed_to_be_another(tmp_path: Path, half: str) -> None:
    for name, factor in (("scan", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        nib.Nifti1Pair(factor * noise(), np.diag([factor, 1, 1, 1])).to_filename(tmp_path / name / "scan.img")
    before = open_nifti(tmp_path / "scan", patch=(4, 4, 4)).records[0]
    times = [stamp(tmp_path / "scan/scan.img")]
    (tmp_path / "other" / f"scan.{half}").replace(tmp_path / "scan" / f"scan.{half}")
    os.utime(tmp_path / "scan" / f"scan.{half}", ns=(1, 1))
    after = open_nifti(tmp_path / "scan", patch=(4, 4, 4)).records[0]
    assert (after.affine[0][0] / before.affine[0][0], after.high / before.high) == ((2, 1) if half == "hdr" else (1, 2))
    assert stamp(tmp_path / "scan/scan.hdr") not in times

"""Each bad file that is known ends as a row with a reason, and takes no other with it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from decovae.preparation.config import PrepareConfig
from decovae.preparation.run import prepare
from decovae.preparation.volume import Preparation
from tests.data.files import noise, write, write_integers
from tests.data.test_bad_volumes import BAD, image

GOOD = ("Größe und Blank.nii.gz", "sub-01_T1w.nii", "big.nii", "frame.nii", "pair.img", "scaled.nii", "annexed.nii")
SMALL_ONLY_FOR_PATCHES = "smaller than the patch"


def test_every_bad_file_is_a_row_and_every_good_one_is_prepared(tmp_path: Path) -> None:
    root = tmp_path / "in"
    bad = {f"bad {number:02d}.nii.gz": name for number, name in enumerate(BAD) if name != SMALL_ONLY_FOR_PATCHES}
    for number, good in enumerate(GOOD[:2]):
        write(root / good, noise(seed=number))
    for file, name in bad.items():
        (root / file).write_bytes(BAD[name][0]())
    (root / "big.nii").write_bytes(image(noise(seed=3).astype(">i2")))
    (root / "frame.nii").write_bytes(image(noise((12, 14, 10, 1), seed=4)))
    (root / "pair.hdr").write_bytes(image(noise(), magic=b"ni1", vox_offset=0)[:352])
    (root / "pair.img").write_bytes(noise(seed=5).tobytes(order="F"))
    write_integers(root / "scaled.nii", noise(seed=6).astype("i2"), slope=-2.0, intercept=30.0)
    (root / "annexed.nii").symlink_to(write(tmp_path / "annex/x.nii", noise(seed=7)))
    (root / "folder.nii.gz").mkdir()
    (root / "loop.nii").symlink_to("loop.nii")
    os.mkfifo(root / "pipe.nii")
    out = tmp_path / "store"
    outcome = prepare(
        PrepareConfig(source=root, out=out, workers=0, pictures=False, volume=Preparation(grid=(8, 8, 8)))
    )
    assert {entry["source"] for entry in outcome.entries} == set(GOOD)
    with (out / "excluded.csv").open(newline="", encoding="utf-8") as file:
        reasons = {row["source"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {*bad, "folder.nii.gz", "loop.nii", "pipe.nii"}
    assert all(reason.endswith(".") and str(tmp_path) not in reason for reason in reasons.values())
    for file, name in bad.items():
        assert BAD[name][1] in reasons[file], name

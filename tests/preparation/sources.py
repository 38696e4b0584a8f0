"""Folders of volumes to prepare, and what a preparation made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from decovae.preparation.config import PrepareConfig
from decovae.preparation.volume import Preparation
from tests.data.files import write

SHAPE = (12, 14, 10)
SMALL = Preparation(grid=(8, 10, 6))
OFTEN_DIFFERENT = {".lock", "progress.jsonl"}
"""Files of a store that tell how it was made, not what it is."""


def brain(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A bright ellipsoid in the dark, int16."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.8
    return (inside * np.random.default_rng(seed).gamma(9.0, 60.0, shape)).astype(np.int16)


def make_volumes(root: Path, count: int) -> list[Path]:
    """Volumes of as many subjects, compressed or not."""
    return [write(root / f"sub-{i:02d}_T1w.nii{'.gz' * (i % 2)}", brain(i)) for i in range(count)]


def make_mixed(root: Path, count: int) -> None:
    """Good volumes, a copy of one, and files that no volume can be read from."""
    first, second, *_ = make_volumes(root, count)
    (root / "copy.nii").write_bytes(first.read_bytes())
    (root / "cut off.nii.gz").write_bytes(second.read_bytes()[:-300])
    (root / "empty.nii").write_bytes(b"")
    write(root / "constant.nii", np.full(SHAPE, 7, np.int16))


def make_bids(root: Path) -> None:
    """Two subjects, two sessions each, T1w and T2w."""
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text('{"Name": "made up", "BIDSVersion": "1.9.0"}')
    (root / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t63\tF\nsub-02\t58\tM\n")
    for seed, (subject, session) in enumerate((s, t) for s in ("01", "02") for t in ("1", "2")):
        for suffix in ("T1w", "T2w"):
            name = f"sub-{subject}_ses-{session}_{suffix}.nii.gz"
            path = root / f"sub-{subject}" / f"ses-{session}" / "anat" / name
            write(path, brain(2 * seed + (suffix == "T2w")), kind=nib.Nifti1Image)


def config(source: Path, out: Path, **options: Any) -> PrepareConfig:
    """A preparation in this process, without pictures, onto a small grid, unless told otherwise."""
    return PrepareConfig(source=source, out=out, **{"workers": 0, "pictures": False, "volume": SMALL, **options})


def contents(folder: Path) -> dict[str, bytes]:
    """A store's files and their bytes, without those that tell how it was made."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OFTEN_DIFFERENT
    }

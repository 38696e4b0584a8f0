"""Stores written for tests, without volumes to prepare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decovae.data.store import file_parts, volume_file
from decovae.preparation.volume import Prepared
from decovae.preparation.writer import finish_store, write_volume

GRID = (6, 8, 5)


def entry_of(index: int, *, sha256: str = "0" * 64, dtype: str = "int16") -> dict[str, Any]:
    """The line of volume `index`, as long as a real one."""
    source = f"sub-{index}/anat/sub-{index}_T1w.nii.gz"
    return {
        "subject": f"sub-{index}",
        "session": "",
        "source": source,
        "source_sha256": "0" * 64,
        "file": volume_file(sha256),
        "sha256": sha256,
        "dtype": dtype,
        "low": -32768.0 if dtype == "int16" else 0.0,
        "high": 0.0 if dtype == "int16" else 1.0,
        "range": [0.0, 1.5],
        "shape": [182, 218, 182],
        "affine": np.diag([1.5, 1.0, 2.0, 1.0]).tolist(),
        "foreground": (bytes([index % 256]) * 384).hex(),
        "columns": {"age": str(index)},
    }


def prepared(index: int, *, seed: int = 0) -> Prepared:
    """A volume as a preparation makes it; every third one in floating point."""
    generator = np.random.default_rng((seed, index))
    dtype = "float16" if index % 3 == 2 else "int16"
    voxels = generator.integers(-32768, 32768, GRID).astype(np.int16)
    if dtype == "float16":
        voxels = generator.gamma(2.0, 100.0, GRID).astype(np.float16)
    header, content = file_parts(voxels)
    digest = hashlib.sha256(header + content.tobytes()).hexdigest()
    return Prepared(voxels, entry_of(index, sha256=digest, dtype=dtype))


def write_store(
    folder: Path,
    count: int,
    *,
    order: Sequence[int] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] = {"fit": "resize"},
) -> Path:
    """A store of the volumes 0 to `count` - 1, written in any order."""
    volumes = [prepared(index, seed=seed) for index in order or range(count)]
    for volume in volumes:
        write_volume(folder, volume)
    finish_store(folder, [volume.entry for volume in volumes], settings, grid=GRID)
    return folder

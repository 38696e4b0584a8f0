"""Random patches a second from a store, beside MONAI's ways to them, and what a store costs: python -m bench.data

python -m bench.data [--subjects N] [--rounds N] [--out FILE] [--folder FOLDER] [--quick]

Brains of the template cohort, 182×218×182 voxels in `.nii.gz` files of 16 bits, left to right reversed, as FSL's
MNI-152 space has them. Patches of 96³ of the grid of 128×256×128 come in batches of two from loaders of two workers,
each of one thread, with the same random transforms in all of them. The reference's way reads, turns, resizes and scales
a whole volume, augments it, and crops one patch. MONAI's PersistentDataset keeps what comes before the first random
transform. Ours reads a store, made by `decovae prepare`, or the files.

Cold means that none of the files lies in the page cache, as mincore confirms; what lies below a virtual machine's disk
may still remember. Preparing is timed in one process, file by file in turns with reading and resizing alone. A worker's
memory is what it wrote to since it was forked. Takes six minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from bench.campaign.table import verdict_cells
from bench.campaign.targets import TARGETS, Target, Verdict
from bench.data_costs import preparing_seconds, worker_memory
from bench.data_rates import counted, rates
from bench.data_tables import NAME, PERSISTENT_BARE, markdown
from bench.data_ways import Places, Size, ways
from bench.page_cache import bytes_on_disk
from bench.processes import environment
from decovae.data.cohort import FULL_SHAPE, cohort_affine, open_cohort
from decovae.data.volumes import Shape
from decovae.files import write_text
from decovae.machine import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

WHOLE = Size(
    subjects=32,
    shape=FULL_SHAPE,
    grid=(128, 256, 128),
    patch=(96, 96, 96),
    batch=2,
    workers=2,
    rounds=3,
    seconds=2.0,
    entries=(100, 25_252),
)
QUICK = replace(
    WHOLE,
    subjects=8,
    shape=(32, 36, 32),
    grid=(24, 32, 24),
    patch=(16, 16, 16),
    workers=1,
    rounds=1,
    seconds=0.0,
    entries=(10, 300),
)


def write_files(folder: Path, count: int, shape: Shape) -> list[Path]:
    """Subjects of the template cohort as files of signed 16 bits, compressed, whose first axis runs from the right."""
    folder.mkdir()
    cohort = open_cohort(count, seed=0, shape=shape)
    affine = np.asarray(cohort_affine(shape)) @ np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[0, 3] = -affine[0, 0] * (shape[0] - 1) + np.asarray(cohort_affine(shape))[0, 3]
    files = []
    for index in range(count):
        voxels = np.round(cohort.read(index)[::-1]).astype(np.int16)
        files.append(folder / f"sub-{index:04d}.nii.gz")
        nib.save(nib.Nifti1Image(voxels, affine), files[-1])
    return files


def measured(size: Size, folder: Path) -> dict[str, Any]:
    """All figures, of volumes in a folder."""
    files = write_files(folder / "nifti", size.subjects, size.shape)
    places = Places(folder / "nifti", files, folder / "store", folder / "cache")
    preparing = preparing_seconds(files, size.grid, folder / "prepared")
    begun = time.perf_counter()
    _prepare(places, size)
    command = time.perf_counter() - begun
    found = ways(places, size)
    [filling] = [way for way in found if way.name == PERSISTENT_BARE]
    begun = time.perf_counter()
    counted(filling.batches(size.subjects // size.batch), size, least=size.subjects, seconds=0)
    filled = time.perf_counter() - begun
    return {
        "crops_per_second": rates(found, size),
        "bytes": {
            "files": bytes_on_disk(places.nifti),
            "store": bytes_on_disk(places.store),
            "PersistentDataset": bytes_on_disk(places.cache),
        },
        "preparing_seconds_per_volume": preparing,
        "all_volumes_seconds": {"decovae prepare": command, "PersistentDataset": filled},
        "worker_private_bytes": worker_memory(places.store, folder / "many", size),
    }


def _prepare(places: Places, size: Size) -> None:
    """`decovae prepare`, as one types it, without pictures."""
    grid = map(str, size.grid)
    options = ["--out", str(places.store), "--volume.grid", *grid, "--workers", str(size.workers), "--no-pictures"]
    command = [sys.executable, "-m", "decovae.cli", "prepare", str(places.nifti), *options]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)


def judged(result: Mapping[str, Any]) -> list[Verdict]:
    """What the figures say of the targets that are measured here."""
    return [_judged(target, result) for target in TARGETS if target.elsewhere and target.elsewhere.file == NAME]


def _judged(target: Target, result: Mapping[str, Any]) -> Verdict:
    figure = target.elsewhere.of(result) if target.elsewhere else None
    if figure is None:
        return Verdict(target, "not measured", None, NAME)
    return Verdict(target, "met" if target.holds(figure) else "missed", target.text(figure), NAME)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, help=f"volumes, an even number; {WHOLE.subjects} by default")
    parser.add_argument("--rounds", type=int, help=f"through all ways; {WHOLE.rounds} by default")
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    parser.add_argument("--folder", type=Path, help="where volumes are kept meanwhile; on the disk that is meant")
    parser.add_argument("--quick", action="store_true", help="a test of this script, on tiny volumes")
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else WHOLE
    size = replace(size, subjects=arguments.subjects or size.subjects, rounds=arguments.rounds or size.rounds)
    if size.subjects % size.batch or size.subjects // size.batch <= size.start:
        parser.error(f"--subjects {size.subjects}: more than {size.batch * size.start}, and an even number")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="monai")  # in its workers too, once for each
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measured(size, Path(folder))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "subjects": size.subjects,
        "shape": size.shape,
        "grid": size.grid,
        "patch": size.patch,
        "batch": size.batch,
        "workers": size.workers,
        **found,
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    print()
    for verdict in judged(result):
        print(" | ".join(verdict_cells(verdict)))


if __name__ == "__main__":
    main()

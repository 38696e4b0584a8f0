"""What preparing costs beside loading and resampling alone, and what a worker keeps of each of many volumes."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench import data_peers
from bench.data_peers import KEY
from bench.data_ways import SEED, Size
from decovae.data.nifti import read_nifti
from decovae.data.patches import PatchDataset
from decovae.data.resample import resample_crop
from decovae.data.store import open_store
from decovae.data.volumes import Shape
from decovae.preparation.candidates import Candidate
from decovae.preparation.volume import Preparation, prepare_volume
from decovae.preparation.writer import finish_store, write_volume

REPEATS = 3
CROPS = 100
"""That a worker reads before its memory is looked at."""


def preparing_seconds(files: Sequence[Path], grid: Shape, folder: Path) -> dict[str, float]:
    """Seconds a volume, in one process of one thread: for each volume the least of several, of which they take turns.

    Args:
        files: the volumes.
        grid: that they are resized to.
        folder: where prepared volumes are put, for a moment.
    """
    from monai.transforms import Compose

    monai = Compose(data_peers.loading(grid))
    preparation = Preparation(grid=grid)

    def prepare(file: Path) -> None:
        write_volume(folder, prepare_volume(Candidate(file.name, "", file, file.name), preparation))

    ways: dict[str, Callable[[Path], object]] = {
        "preparing": prepare,
        "loading and resampling": lambda file: _resampled(file, grid),
        "loading and resampling, MONAI": lambda file: monai({KEY: str(file)}),
    }
    seconds = dict.fromkeys(ways, 0.0)
    for file in files:
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _, (name, way) in itertools.product(range(REPEATS), ways.items()):
            begun = time.perf_counter()
            way(file)
            taken[name].append(time.perf_counter() - begun)
            shutil.rmtree(folder, ignore_errors=True)  # a file that replaces another is written out at once by some
        for name, each in taken.items():
            seconds[name] += min(each) / len(files)
    return seconds


def _resampled(file: Path, grid: Shape) -> torch.Tensor:
    return resample_crop(read_nifti(file).voxels, grid=grid, corner=(0, 0, 0), size=grid)


def worker_memory(store: Path, folder: Path, size: Size) -> dict[str, dict[str, int]]:
    """Bytes that a loader's worker has of its own once it has touched every volume's entry, by number of entries.

    What it shares with the process that it was forked from is not in it, nor is the page cache. A worker of ours has
    then read crops, too.

    Args:
        store: with at least one volume; all entries are of its first.
        folder: for stores of many entries.
        size: with the numbers of entries.
    """
    found: dict[str, dict[str, int]] = {"ours": {}, "MONAI": {}}
    for count in size.entries:
        many = folder / str(count)
        _store_of(store, many, count)
        ours = PatchDataset(open_store(many), range(count), grid=size.grid, patch=size.patch, seed=SEED)
        found["ours"][str(count)] = _private_bytes(_TouchOurs(ours))
        files = [Path(f"/volumes/sub-{number:05d}/anat/sub-{number:05d}_T1w.nii.gz") for number in range(count)]
        found["MONAI"][str(count)] = _private_bytes(_TouchMonai(data_peers.monai_dataset(files, [len], None)))
    return found


def _store_of(store: Path, folder: Path, count: int) -> None:
    """A store of so many entries, all of the first volume of another."""
    opened = open_store(store)
    entry = opened.entry(0)
    file = folder / entry["file"]
    file.parent.mkdir(parents=True)
    file.hardlink_to(store / entry["file"])
    entries = ({**entry, "subject": f"sub-{number:05d}", "source": f"sub-{number:05d}"} for number in range(count))
    finish_store(folder, entries, {}, grid=opened.grid)


class _TouchOurs(Dataset[int]):
    def __init__(self, dataset: PatchDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, _: int) -> int:
        records = self.dataset.volumes.records
        for number in range(len(records)):
            assert records[number].subject
        for position in range(CROPS):
            np.array(self.dataset[position].voxels)
        return _own_bytes()


class _TouchMonai(Dataset[int]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, _: int) -> int:
        for number in range(len(self.dataset)):
            assert self.dataset[number]
        return _own_bytes()


def _private_bytes(dataset: Dataset[int]) -> int:
    """What the dataset says in a worker of its own."""
    return int(next(iter(DataLoader(dataset, batch_size=None, sampler=[0], num_workers=1))))


def _own_bytes() -> int:
    """Memory that this process wrote to since it was forked, or got for itself (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))

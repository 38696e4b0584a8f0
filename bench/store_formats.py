"""What a store of volumes should be kept in: size, and random 96³ crops from it: python -m bench.store_formats

python -m bench.store_formats [--out FILE] [--folder FOLDER] [--quick]

Volumes of 128×256×128 voxels in 16 bits, as `decovae prepare` makes them: brains of the template cohort, with nothing
around them, and the same with noise all over, as heads have it whose skull was left on, which nothing compresses. Each
is kept as `.npy`, in C order, so with the longest axis first, and in blocks of 32³, as bare voxels, and as zarr v3 with
all chunks in one shard. A crop is what a worker does for a sample: open a volume, among more than it could hold open,
and copy the crop out of it, in one process of one thread (zarr has more of its own). Before a cold crop all of its
volume is put out of the page cache, which mincore confirms, and behind it stands how much of the file the system has
read for it; what lies below a virtual machine's disk may still remember. Takes a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import units
from bench.page_cache import PAGE, bytes_on_disk, drop, files_of, resident
from bench.volume_formats import Crop, Format, formats
from decovae.data.cohort import FULL_SHAPE, open_cohort
from decovae.data.patches import load_volume
from decovae.data.volumes import Shape, times
from decovae.files import write_text
from decovae.machine import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NAME = "store-formats-cpu.json"


@dataclass(frozen=True)
class Size:
    """How much is measured: volumes of a grid, the cohort's shape, patches, and crops in rounds over all formats."""

    volumes: int
    shape: Shape
    grid: Shape
    patch: int
    rounds: int
    crops: int


WHOLE = Size(volumes=6, shape=FULL_SHAPE, grid=(128, 256, 128), patch=96, rounds=7, crops=12)
QUICK = Size(volumes=1, shape=(32, 36, 32), grid=(64, 64, 64), patch=48, rounds=1, crops=2)


def volumes(size: Size, *, noisy: bool) -> list[np.ndarray]:
    """Brains of the template cohort, resized and in 16 bits.

    Args:
        size: how many and how large.
        noisy: noise of 2% of the brightest stands in every voxel, so that none is empty.
    """
    cohort = open_cohort(size.volumes, seed=0, shape=size.shape)
    found = []
    for index in range(size.volumes):
        volume = load_volume(cohort, index, size.grid)[0].numpy()
        if noisy:
            noise = np.random.default_rng(index).standard_normal((2, *size.grid), np.float32)
            volume = np.hypot(volume + 0.02 * noise[0], 0.02 * noise[1])
        low, high = float(volume.min()), float(volume.max())
        found.append(np.round((volume - low) * (65535 / (high - low)) - 32768).astype(np.int16))
    return found


def corners(size: Size, round_: int) -> list[tuple[int, Crop]]:
    """Volumes and crops of a round: those of all formats alike."""
    generator = np.random.default_rng(round_)
    room = np.subtract(size.grid, size.patch) + 1
    found = []
    for _ in range(size.crops):
        first, second, third = (slice(int(at), int(at) + size.patch) for at in generator.integers(room))
        found.append((int(generator.integers(size.volumes)), (first, second, third)))
    return found


def measured(kept: Mapping[str, Sequence[Path]], found: Sequence[Format], size: Size) -> dict[str, dict[str, Any]]:
    """Crops a second of every format, round by round through all of them, so that none has a quiet machine alone."""
    seconds: dict[str, dict[str, list[float]]] = {way.name: {"warm": [], "cold": []} for way in found}
    read: dict[str, list[int]] = {way.name: [] for way in found}
    for round_ in range(size.rounds):
        wanted = corners(size, round_)
        for way in found:
            for index, crop in wanted:
                path = kept[way.name][index]
                drop(path)
                seconds[way.name]["cold"].append(_seconds(way, path, crop))
                read[way.name].append(resident(path) * PAGE)
            for path in kept[way.name]:
                for file in files_of(path):
                    file.read_bytes()
            seconds[way.name]["warm"] += [_seconds(way, kept[way.name][index], crop) for index, crop in wanted]
    return {
        name: {
            **{f"{state}_crops_per_second": 1 / statistics.median(taken[state]) for state in taken},
            **{
                f"{state}_seconds_quartiles": [float(q) for q in np.quantile(taken[state], (0.25, 0.75))]
                for state in taken
            },
            "cold_bytes_read": statistics.median(read[name]),
        }
        for name, taken in seconds.items()
    }


def _seconds(way: Format, path: Path, crop: Crop) -> float:
    begun = time.perf_counter()
    way.read(path, crop)
    return time.perf_counter() - begun


def compared(size: Size, folder: Path, *, noisy: bool) -> list[dict[str, Any]]:
    """A line a format, for one kind of volume.

    Raises:
        RuntimeError: a format gave other voxels than were written.
    """
    made, ways = volumes(size, noisy=noisy), formats(size.grid)
    kept: dict[str, list[Path]] = {}
    writing: dict[str, float] = {}
    for number, way in enumerate(ways):
        kept[way.name] = [folder / f"{number}-{index}" for index in range(size.volumes)]
        begun = time.perf_counter()
        for path, volume in zip(kept[way.name], made, strict=True):
            way.write(path, volume)
        writing[way.name] = (time.perf_counter() - begun) / size.volumes
        for index, crop in corners(size, 0):
            if not np.array_equal(way.read(kept[way.name][index], crop), made[index][crop]):
                raise RuntimeError(f"{way.name} gives other voxels than were written")
    speeds = measured(kept, ways, size)
    return [
        {
            "format": way.name,
            "bytes_per_volume": sum(map(bytes_on_disk, kept[way.name])) / size.volumes,
            "write_seconds": writing[way.name],
            **speeds[way.name],
        }
        for way in ways
    ]


KINDS = {"brains": False, "brains and noise": True}


def markdown(result: Mapping[str, Any]) -> str:
    """A table, a line a format."""
    first = next(iter(result["kinds"]))
    lines = [["format", *(f"{kind}, a volume" for kind in result["kinds"]), "warm", "cold", "read for a cold crop"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for place, row in enumerate(result["kinds"][first]):
        sizes = [units.size(rows[place]["bytes_per_volume"]) for rows in result["kinds"].values()]
        speeds = [f"{row[f'{state}_crops_per_second']:.0f} crops/s" for state in ("warm", "cold")]
        lines.append([row["format"], *sizes, *speeds, units.size(row["cold_bytes_read"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def explanation(result: Mapping[str, Any]) -> str:
    """What the table is of, and what it decides."""
    return (
        f"Volumes of {times(result['grid'])} in 16 bits, {result['crops']} patches of {result['patch']}³ from "
        f"{result['volumes']} of them, the volume opened for each, in one process of one thread (zarr has more); "
        "speeds are those of brains with nothing around them. Announced is what the system is asked for before the "
        "first voxel is touched. "
        "A row of voxels is shorter than a page, so that C order touches fewer pages than blocks do, and with the "
        "longest axis first all that a crop covers lies in one piece, which takes one request; "
        "zarr saves room only where the background is exactly zero, and takes a Python call for each chunk."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / NAME)
    parser.add_argument("--folder", type=Path, help="where volumes are kept meanwhile; on the disk that is meant")
    parser.add_argument("--quick", action="store_true", help="a test of this script, on tiny volumes")
    arguments = parser.parse_args(argv)
    size = QUICK if arguments.quick else WHOLE
    torch.set_num_threads(1)
    kinds = {}
    for kind, noisy in KINDS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            kinds[kind] = compared(size, Path(folder), noisy=noisy)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "grid": size.grid,
        "patch": size.patch,
        "volumes": size.volumes,
        "crops": size.rounds * size.crops,
        "kinds": kinds,
    }
    write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()

"""What `bench.data` found, as tables and as the figures that targets are of."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench import units
from decovae.data.volumes import times

NAME = "data-cpu.json"

STATES = ("warm", "cold")

REFERENCE = "MONAI, the reference's way"
PERSISTENT = "MONAI PersistentDataset, the reference's order"
PERSISTENT_CROP = "MONAI PersistentDataset, cropped before augmentation"
PERSISTENT_BARE = "MONAI PersistentDataset, no augmentation"
FOLDER = "ours, from the files"
FOLDER_BARE = "ours, from the files, no augmentation"
STORE = "ours, from the store"
STORE_BARE = "ours, from the store, no augmentation"
STORE_RAW = "ours, from the store, as stored, for a GPU to finish"

PAIRS = {
    "reference": {"the reference's way; the store leaves augmentation to a GPU": (STORE_BARE, REFERENCE)},
    "persistent": {"PersistentDataset, the reference's order; both augment on the CPU": (STORE, PERSISTENT)},
    "beside": {
        "the reference's way; both augment on the CPU": (STORE, REFERENCE),
        "PersistentDataset; neither augments": (STORE_BARE, PERSISTENT_BARE),
        "PersistentDataset, cropped first; both augment on the CPU": (STORE, PERSISTENT_CROP),
    },
}
"""What is compared with what: pairs that a target is of, and others that say where it ends."""


def crops_factor(result: Mapping[str, Any], target: str) -> float:
    """How many times as many crops a second come from the store, at least: of all pairs of a target, warm and cold."""
    return min(factor(result, pair, state) for pair in PAIRS[target].values() for state in STATES)


def factor(result: Mapping[str, Any], pair: tuple[str, str], state: str) -> float:
    """The first's crops a second over the second's, by the medians of the rounds."""
    ours, theirs = (statistics.median(result["crops_per_second"][name][state]) for name in pair)
    return ours / theirs


def size_share(result: Mapping[str, Any]) -> float:
    """Bytes of the store over PersistentDataset's."""
    return float(result["bytes"]["store"] / result["bytes"]["PersistentDataset"])


def preparing_factor(result: Mapping[str, Any]) -> float:
    """Time of preparing over that of loading and resampling alone, by whichever does that faster."""
    seconds = result["preparing_seconds_per_volume"]
    return float(seconds["preparing"] / min(taken for name, taken in seconds.items() if name != "preparing"))


def memory_growth(result: Mapping[str, Any]) -> float:
    """Bytes that a worker has more of its own with the most entries than with the fewest, if it has."""
    found = {int(count): private for count, private in result["worker_private_bytes"]["ours"].items()}
    return max(0.0, float(found[max(found)] - found[min(found)]))


def markdown(result: Mapping[str, Any]) -> str:
    """Four tables: crops a second, what of it is how many times as much, room and time, a worker's memory."""
    speed = [[f"{result['patch'][0]}³ patches a second", *STATES], ["---", *["---:"] * len(STATES)]]
    for name, found in result["crops_per_second"].items():
        speed.append([name, *(_spread(found[state]) for state in STATES)])
    times_ = [["the store gives, times as many as", *STATES], ["---", *["---:"] * len(STATES)]]
    for pairs in PAIRS.values():
        for title, pair in pairs.items():
            times_.append([title, *(units.times(factor(result, pair, state)) for state in STATES)])

    count, seconds = result["subjects"], result["preparing_seconds_per_volume"]
    sizes = [units.size(result["bytes"][name] / count) for name in ("files", "PersistentDataset", "store")]
    alone = [units.seconds(seconds[f"loading and resampling{whose}"]) for whose in (", MONAI", "")]
    every = [units.seconds(result["all_volumes_seconds"][name]) for name in ("PersistentDataset", "decovae prepare")]
    room = [
        ["a volume", "`.nii.gz`", "MONAI", "ours"],
        ["---", "---:", "---:", "---:"],
        ["its file, PersistentDataset's and the store's", *sizes],
        ["loading and resampling alone, one process", units.DASH, *alone],
        ["preparing, one process", units.DASH, units.DASH, units.seconds(seconds["preparing"])],
        [f"all {count}, filled by a loader or `decovae prepare`, {result['workers']} processes", units.DASH, *every],
    ]
    memory = result["worker_private_bytes"]
    counts = list(memory["ours"])
    own = [
        ["a worker's own memory", *(f"{int(entries):,} volumes" for entries in counts)],
        ["---", *["---:"] * len(counts)],
        *(
            [name, *(units.size(memory[key][entries]) for entries in counts)]
            for name, key in {"a store": "ours", "MONAI's Dataset of files": "MONAI"}.items()
        ),
    ]
    return "\n\n".join(_grid(table) for table in (speed, times_, room, own))


def explanation(result: Mapping[str, Any]) -> str:
    """What the tables are of."""
    return (
        f"{result['subjects']} brains of the template cohort, {times(result['shape'])} voxels in files of 16 bits; a "
        f"grid of {times(result['grid'])}; loaders of {result['workers']} workers, batches of {result['batch']}; all "
        "ways take turns. A rate is the median of the rounds, in brackets the least and the most; cold, none of the "
        "files lies in the page cache. Where a run has a GPU, the loader hands out voxels as they are stored, and "
        "scaling and augmentation are the GPU's; both are in the rates elsewhere. A worker's own memory is what it "
        "wrote to since it was forked."
    )


def _spread(found: Sequence[float]) -> str:
    def text(rate: float) -> str:
        return f"{rate:.0f}" if rate >= 99.5 else f"{rate:.1f}" if rate >= 9.95 else f"{rate:.2f}"

    return f"{text(statistics.median(found))} ({text(min(found))} to {text(max(found))})"


def _grid(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

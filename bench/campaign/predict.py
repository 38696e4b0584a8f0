"""What two cards are predicted to take, from published figures and counts: python -m bench.campaign predict

A row's predicted time is the least that it could take: its counted bytes over the card's bandwidth, or its counted
products over the rate of their dtype, whichever is longer. Nothing is as fast; what a card reaches is what a campaign
measures. Memory is counted on fake tensors, as in `bench.memory`. Needs no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.campaign import cases
from bench.campaign.rows import Row, count_rows
from bench.measure import floor_seconds
from bench.memory import SWEEP, count_full_step, count_training, versions
from decovae.files import write_text
from decovae.machine import describe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results" / "campaign-predicted"
FILE = "predicted.json"

FULL_STEPS = ((2, (96, 96, 96)), (1, (128, 256, 128)))
"""Batches and patches of the whole training step, with losses, discriminators and optimizers."""


@dataclass(frozen=True)
class Card:
    """A card's published figures.

    Attributes:
        name: as people call it.
        memory_gib: GiB, 2³⁰ bytes.
        bytes_per_second: of its memory.
        flops_per_second: of dense matrix products with float32 accumulation, by the dtype of the factors.
        source: where the figures are from.
    """

    name: str
    memory_gib: float
    bytes_per_second: float
    flops_per_second: Mapping[str, float]
    source: str

    def rate(self, dtype: str | None) -> float | None:
        """Products a second; None for a row without products.

        Raises:
            KeyError: no figure for this dtype.
        """
        return None if dtype is None else self.flops_per_second[dtype]


RTX_3090 = Card(
    "RTX 3090",
    24,
    936e9,
    {"bfloat16": 71e12, "float16": 71e12, "tf32": 35.6e12, "float32": 35.6e12},
    "NVIDIA Ampere GA102 GPU architecture whitepaper, GeForce RTX 3090: memory bandwidth, and peak dense rates with "
    "float32 accumulation",
)
H200 = Card(
    "H200",
    140,
    4.3e12,
    {"bfloat16": 989e12, "float16": 989e12, "tf32": 495e12, "float32": 67e12},
    "NVIDIA H200 datasheet: rates without sparsity (half of those printed with it); bandwidth is what a copy was "
    "measured to reach elsewhere, the datasheet says 4.8 TB/s; memory as drivers show what is sold as 141 GB",
)
CARDS = (RTX_3090, H200)


def least_seconds(info: Mapping[str, Any], card: Card) -> tuple[float, str]:
    """The least time of a row on a card, and whether "bytes" or "operations" take it.

    Args:
        info: the row's floors: ``bytes_moved_floor``, ``flops_floor``, ``matrix_dtype``.
        card: with its published figures.
    """
    products = info.get("flops_floor") or 0
    return floor_seconds(info, card.bytes_per_second, card.rate(info.get("matrix_dtype")) if products else None)


def predicted_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Counted rows as a file keeps them, each with its least time on every card."""
    kept = []
    for row in rows:
        times = {}
        if cases.of(row) is not None:
            for card in CARDS:
                seconds, by = least_seconds(row.extra_info or {}, card)
                times[card.name] = {"seconds": seconds, "by": by}
        kept.append({**row.as_dict(), "least": times})
    return kept


def sweep_shapes(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """Shapes (N, 1, D, H, W) of the sweep's rows, smallest first."""
    found = {case.shape for row in rows if (case := cases.of(row)) is not None and case.suite == "sweep"}
    shapes = [tuple(int(length) for length in shape.split("x")) for shape in found]
    return sorted(shapes, key=lambda shape: (shape[0], shape[2:]))


def counted_memory(shapes: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """The autoencoder's training step at every shape, for every implementation of the sweep: minutes."""
    kept: list[dict[str, Any]] = []
    for shape in shapes:
        for name, variant in SWEEP.items():
            found = count_training(variant, shape)
            kept.append({"implementation": name, "shape": list(shape), "saved": found.saved, "peak": found.peak})
            print(f"{name}, {'×'.join(map(str, shape))}: peak {found.peak / 1e9:.2f} GB", flush=True)
    return kept


def load(folder: Path = FOLDER) -> dict[str, Any] | None:
    """What was predicted; None if nothing was yet."""
    file = folder / FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def main(argv: Sequence[str]) -> int:
    """Count, predict, and write the file, the table and the plots."""
    from bench.campaign import plots, table

    parser = argparse.ArgumentParser(prog="python -m bench.campaign predict", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--keep-memory", action="store_true", help="take the memory that was counted last time")
    arguments = parser.parse_args(argv)
    rows = [replace(row, finished=0.0, seconds=0.0) for row in count_rows("gpu")]
    before = load(arguments.out)
    if arguments.keep_memory and before is not None:
        memory, steps = before["memory"], before["full_steps"]
    else:
        memory, steps = counted_memory(sweep_shapes(rows)), [count_full_step(*step) for step in FULL_STEPS]
    result = {
        "kind": "predicted",
        "version": 1,
        "date": datetime.date.today().isoformat(),
        "machine": describe() | versions(),
        "cards": [asdict(card) for card in CARDS],
        "rows": predicted_rows(rows),
        "memory": memory,
        "full_steps": steps,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / FILE, json.dumps(result, indent=1) + "\n")
    table.write_predicted(arguments.out, result)
    plots.write_predicted(arguments.out, result)
    print(f"{arguments.out}: {len(rows)} rows counted")
    return 0

"""Rows and campaigns that nobody measured, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from bench.campaign.record import Campaign
from bench.campaign.rows import Row

CPU = {"system": "OS", "processor": "Abacus", "torch_threads": 2, "torch": "2", "triton": None, "python": "3"}
GPU = {**CPU, "gpu": "Card", "gpu_memory_gib": 80.0, "gpu_driver": "1", "cuda": "13"}

CASE = {
    "suite": "losses",
    "subject": "VAD",
    "shape": "2x4x8",
    "dtype": "float32",
    "direction": "forward",
}


def counted(implementation: str, **changes: Any) -> Row:
    """A row that states its case and floors alone."""
    floors = {"bytes_moved_floor": 2_000_000, "flops_floor": 0, "matrix_dtype": None}
    info = {**CASE, "implementation": implementation, **floors, **changes}
    return Row(
        f"bench/test_it.py::test_it[{'-'.join(map(str, changes.values()))}-{implementation}]",
        "counted",
        extra_info=info,
    )


def measured(implementation: str, median: float, **changes: Any) -> Row:
    """A row with a time, at 4 GB/s and 1 GFLOP/s."""
    found = {
        "copy_bytes_per_second": 4e9,
        "matrix_flops_per_second": 1e9 if changes.get("flops_floor") else None,
        "peak_extra_bytes": 512,
        "peak_bytes": 1_000_000,
        "reserved_bytes": None,
        "saved_bytes": 3_000_000,
    }
    row = counted(implementation, **changes)
    stats = {"median": median, "iqr": median / 10, "min": median, "max": median, "rounds": 5}
    return Row(row.id, "measured", stats=stats, extra_info={**found, **(row.extra_info or {})})


def without_time(row: Row, outcome: Any, reason: str | None = None) -> Row:
    """The same row, had it ended so."""
    return Row(row.id, outcome, reason, extra_info=row.extra_info)


def campaign(*rows: Row, scale: str = "cpu", machine: dict[str, Any] | None = None, **changes: Any) -> Campaign:
    """A campaign with these rows."""
    given = {"date": "2031-05-06", "seconds": 120.0, **changes}
    commit = {"id": "0123456789", "dirty": True}
    return Campaign(scale, dict(machine or CPU), commit, {"monai": "1", "lightly": None}, rows=list(rows), **given)

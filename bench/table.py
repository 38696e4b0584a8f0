"""The Markdown tables of a result of `pytest bench`: python -m bench.table bench/results/losses-cpu.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from decovae.errors import InputError

LEGEND = """\
*Median* of whole calls, with their interquartile range as *spread*; *of ours* is the median over this project's.
*Floor* is what has to move: one read of μ forward; two reads and a write of its gradient forward+backward. *Share* is
floor over median, as a share of the bandwidth that a copy of μ reached in the same run. *Extra memory* is the highest
level of torch's allocations beyond μ and, for forward+backward, its gradient. lightly's terms do VAD's work but are
defined differently."""


def load(path: Path) -> dict[str, Any]:
    """A result that `pytest bench --benchmark-json` wrote.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if all("copy_bytes_per_second" in row["extra_info"] for row in result["benchmarks"]):
            return dict(result)
    except FileNotFoundError:
        command = f"pytest bench --benchmark-only --benchmark-json {path}"
        raise InputError(f"{path}: no such file; `{command}` writes it.") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not a result that this version's `pytest bench --benchmark-json` wrote; measure again.")


def share_of_copy_bandwidth(row: dict[str, Any]) -> float:
    """The floor's bytes over the median, as a share of what a copy reached."""
    info = row["extra_info"]
    return float(info["bytes_moved_floor"] / row["stats"]["median"] / info["copy_bytes_per_second"])


def markdown(result: dict[str, Any]) -> str:
    """A line on the machine, a table for each loss and shape, and what the columns mean."""
    on_gpu = "gpu" in result["machine_info"]
    parts = [_origin(result["machine_info"], result["commit_info"])]
    for (loss, shape), rows in groupby(result["benchmarks"], key=lambda row: _info(row, "loss", "shape")):
        parts += [f"**{loss}, {shape.replace('x', '×')}**", _table(rows, on_gpu)]
    return "\n\n".join([*parts, LEGEND])


def _info(row: dict[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(row["extra_info"][key] for key in keys)


def _origin(machine: dict[str, Any], commit: dict[str, Any]) -> str:
    hardware = [f"{machine['processor']} with {machine['torch_threads']} threads"]
    if "gpu" in machine:
        hardware = [f"{machine['gpu']}, driver {machine['gpu_driver']}, CUDA {machine['cuda']}", *hardware]
    software = [f"{name} {machine[name.lower()]}" for name in ("torch", "Triton", "Python") if machine[name.lower()]]
    changes = " with uncommitted changes" if commit["dirty"] else ""
    return f"{'; '.join(hardware)}; {', '.join(software)}; {machine['system']}; commit {commit['id'][:7]}{changes}."


def _table(rows: Iterable[dict[str, Any]], on_gpu: bool) -> str:
    count = "launches" if on_gpu else "operators"
    header = ["", "implementation", "median", "spread", "of ours", "floor", "share", count, "extra memory"]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for case, group in groupby(rows, key=lambda row: " ".join(_info(row, "dtype", "direction"))):
        members = list(group)
        ours = [row["stats"]["median"] for row in members if row["extra_info"]["implementation"] == "ours"]
        for index, row in enumerate(members):
            info, stats = row["extra_info"], row["stats"]
            lines.append(
                [
                    case if index == 0 else "",
                    info["implementation"],
                    _seconds(stats["median"]),
                    f"{stats['iqr'] / stats['median']:.0%}",
                    f"{stats['median'] / ours[0]:.2f}×" if ours else "–",
                    _bytes(info["bytes_moved_floor"]),
                    f"{share_of_copy_bandwidth(row):.1%}",
                    "–" if info[count] is None else str(info[count]),
                    _bytes(info["peak_extra_bytes"]),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(value: float) -> str:
    return _scaled(value, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)))


def _bytes(value: float) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    scaled = value / size
    digits = 0 if unit == "B" or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m bench.table FILE", file=sys.stderr)
        return 2
    try:
        print(markdown(load(Path(arguments[0]))))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

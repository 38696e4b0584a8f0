"""The Markdown tables of a result of `pytest bench`: python -m bench.table bench/results/losses-cpu.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from decovae.errors import InputError

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any]:
    """A result that `pytest bench --benchmark-json` wrote.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if all("copy_bytes_per_second" in row["extra_info"] and _suite(row) for row in result["benchmarks"]):
            return dict(result)
    except FileNotFoundError:
        command = f"pytest bench --benchmark-only --benchmark-json {path}"
        raise InputError(f"{path}: no such file; `{command}` writes it.") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: not a result that this version's `pytest bench --benchmark-json` wrote; measure again.")


def share_of_floor(row: Row) -> float:
    """The least time over the median: bytes at a copy's bandwidth, or products at their rate, whichever is more."""
    info = row["extra_info"]
    seconds = info["bytes_moved_floor"] / info["copy_bytes_per_second"]
    if info.get("flops_floor"):
        seconds = max(seconds, info["flops_floor"] / info["matrix_flops_per_second"])
    return float(seconds / row["stats"]["median"])


def markdown(result: dict[str, Any]) -> str:
    """A line on the machine, a table for each loss or block and shape, and what the columns mean."""
    on_gpu = "gpu" in result["machine_info"]
    parts = [_origin(result["machine_info"], result["commit_info"])]
    for suite, suite_rows in groupby(result["benchmarks"], key=_suite):
        for (subject, shape), rows in groupby(suite_rows, key=lambda row: _info(row, suite.subject, "shape")):
            parts += [f"**{subject}, {shape.replace('x', '×')}**", _table(rows, suite, on_gpu)]
        parts.append(suite.legend)
    return "\n\n".join(parts)


def _info(row: Row, *keys: str) -> tuple[Any, ...]:
    return tuple(row["extra_info"][key] for key in keys if key in row["extra_info"])


def _origin(machine: dict[str, Any], commit: dict[str, Any]) -> str:
    hardware = [f"{machine['processor']} with {machine['torch_threads']} threads"]
    if "gpu" in machine:
        hardware = [f"{machine['gpu']}, driver {machine['gpu_driver']}, CUDA {machine['cuda']}", *hardware]
    software = [f"{name} {machine[name.lower()]}" for name in ("torch", "Triton", "Python") if machine[name.lower()]]
    changes = " with uncommitted changes" if commit["dirty"] else ""
    return f"{'; '.join(hardware)}; {', '.join(software)}; {machine['system']}; commit {commit['id'][:7]}{changes}."


def _table(rows: Iterable[Row], suite: Suite, on_gpu: bool) -> str:
    counted = "launches" if on_gpu else "operators"
    names = [counted if name == COUNT else name for name in suite.columns]
    header = ["", "implementation", "median", "spread", "of ours", *names]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for case, group in groupby(rows, key=lambda row: " ".join(_info(row, "dtype", "layout", "direction"))):
        members = list(group)
        ours = [row["stats"]["median"] for row in members if _is_ours(row)]
        for index, row in enumerate(members):
            stats = row["stats"]
            lines.append(
                [
                    case if index == 0 else "",
                    row["extra_info"]["implementation"],
                    _seconds(stats["median"]),
                    f"{stats['iqr'] / stats['median']:.0%}",
                    f"{stats['median'] / ours[0]:.2f}×" if ours else "–",
                    *(cell(row) for cell in suite.columns.values()),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_ours(row: Row) -> bool:
    return str(row["extra_info"]["implementation"]).partition("-")[0] == "ours"


def _floor(row: Row) -> str:
    info = row["extra_info"]
    moving = info["bytes_moved_floor"] / info["copy_bytes_per_second"]
    if info.get("flops_floor") and info["flops_floor"] / info["matrix_flops_per_second"] > moving:
        return _operations(info["flops_floor"])
    return _bytes(info["bytes_moved_floor"])


def _share(row: Row) -> str:
    return f"{share_of_floor(row):.1%}"


def _count(row: Row) -> str:
    launches, operators = _info(row, "launches", "operators")
    return _or_dash(operators if launches is None else launches, str)


def _extra_memory(row: Row) -> str:
    return _bytes(row["extra_info"]["peak_extra_bytes"])


def _saved(row: Row) -> str:
    return _or_dash(row["extra_info"]["saved_bytes"], _bytes)


def _arithmetic(row: Row) -> str:
    return _or_dash(row["extra_info"]["flops"], _operations)


def _or_dash(value: Any, text: Callable[[Any], str]) -> str:
    return "–" if value is None else text(value)


def _seconds(value: float) -> str:
    return _scaled(value, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)))


def _bytes(value: float) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def _operations(value: float) -> str:
    return _scaled(value, (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1)))


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, size = next((pair for pair in units if value >= pair[1]), units[-1])
    scaled = value / size
    digits = 0 if unit in ("B", "FLOP") or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


COUNT = "launches or operators"


class Suite(NamedTuple):
    """How the rows of one file of benchmarks are shown."""

    subject: str
    """What a row says it measured under; which suite a row is of is known by it."""
    columns: dict[str, Callable[[Row], str]]
    legend: str


SUITES = (
    Suite(
        "loss",
        {"floor": _floor, "share": _share, COUNT: _count, "extra memory": _extra_memory},
        """\
*Median* of whole calls, with their interquartile range as *spread*; *of ours* is the median over this project's.
*Floor* is what has to move: one read of μ forward; two reads and a write of its gradient forward+backward. *Share* is
floor over median, as a share of the bandwidth that a copy of μ reached in the same run. *Extra memory* is the highest
level of torch's allocations beyond μ and, for forward+backward, its gradient. lightly's terms do VAD's work but are
defined differently.""",
    ),
    Suite(
        "block",
        {
            "floor": _floor,
            "share": _share,
            "peak memory": _extra_memory,
            "saved": _saved,
            "arithmetic": _arithmetic,
        },
        """\
*Median* of whole calls, with their interquartile range as *spread*; *of ours* is the median over this project's first
row. *Floor* is the least that has to be moved or multiplied, whichever takes longer at the bandwidth of a copy and the
rate of a large matrix product in the same run; bench/floors.py counts it. *Share* is that time over the median. *Peak
memory* is the highest level of torch's allocations beyond what goes in, what comes out and the parameters. *Saved* is
what autograd keeps for backward, parameters and their casts left out. *Arithmetic* counts products and convolutions as
often as they run; in compiled code it cannot be counted.""",
    ),
)


def _suite(row: Row) -> Suite:
    [suite] = [suite for suite in SUITES if suite.subject in row["extra_info"]]
    return suite


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

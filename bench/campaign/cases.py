"""What a row says of itself: what it measured, whose it is, and how near to its floor it came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.campaign.rows import Row
from bench.measure import floor_seconds

OURS, PLAIN, MONAI, OTHERS = "ours", "plain torch", "MONAI", "others"
FAMILIES = (OURS, PLAIN, MONAI, OTHERS)

DEFAULTS = ("ours-balanced-compiled", "ours-compiled", "ours-auto", "ours-balanced", "ours")
"""What this project does unless told otherwise is the first of these that a case has a row of: training, sampling and
the flow are compiled where that is measured, and the blocks' memory is `balanced`."""

CEILING = "ceiling_copy_bytes_per_second"
"""Of a row's facts, put there by who knows the machine: the bandwidth of a copy of the best size."""


@dataclass(frozen=True)
class Case:
    """What rows have in common that are to be compared: all that is stated but the implementation."""

    suite: str
    subject: str
    shape: str
    dtype: str
    direction: str
    layout: str | None

    @property
    def title(self) -> str:
        """What differs between the cases of one table."""
        return " ".join(part for part in (self.dtype, self.layout, self.direction) if part)


def of(row: Row) -> Case | None:
    """The case of a row; None if it ended before it stated one."""
    info = row.extra_info
    if not info or "subject" not in info:
        return None
    stated: dict[str, str] = {key: info[key] for key in ("suite", "subject", "shape", "dtype", "direction")}
    return Case(**stated, layout=info.get("layout"))


def by_case(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    """Rows that state a case, under it: this project's first, each family's in their order."""
    found: dict[Case, list[Row]] = {}
    for row in rows:
        case = of(row)
        if case is not None:
            found.setdefault(case, []).append(row)
    for group in found.values():
        group.sort(key=lambda row: FAMILIES.index(family(implementation(row))))
    return found


def implementation(row: Row) -> str:
    return str((row.extra_info or {})["implementation"])


def family(name: str) -> str:
    """Whose an implementation is."""
    if name.partition("-")[0] == "ours":
        return OURS
    if name.startswith("monai"):
        return MONAI
    return PLAIN if name.startswith(("plain", "channel-rows", "sample-rows")) else OTHERS


def median(row: Row) -> float | None:
    """Seconds of a call; None where nothing was measured."""
    return float(row.stats["median"]) if row.outcome == "measured" and row.stats else None


def measured(row: Row, key: str) -> float | None:
    """A number that was measured beside the time."""
    if row.outcome != "measured":
        return None
    value = (row.extra_info or {}).get(key)
    return None if value is None else float(value)


def fastest(rows: Iterable[Row], families: str | Iterable[str]) -> Row | None:
    """The measured row of the least median among these families' rows."""
    wanted = {families} if isinstance(families, str) else set(families)
    timed = [(time, row) for row in rows if family(implementation(row)) in wanted and (time := median(row)) is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def default(rows: Iterable[Row]) -> Row | None:
    """The row of this project's default, whatever became of it: no other stands in for one that failed."""
    there = {implementation(row): row for row in rows}
    return next((there[name] for name in DEFAULTS if name in there), None)


def measured_floor(row: Row) -> tuple[float, str] | None:
    """The least time at what a copy and a matrix product reached in the same run."""
    info = row.extra_info or {}
    if row.outcome != "measured" or not info.get("copy_bytes_per_second"):
        return None
    return floor_seconds(info, info["copy_bytes_per_second"], info.get("matrix_flops_per_second"))


def share_of_floor(row: Row) -> float | None:
    """The least time over the median.

    None also where the bytes' least time is of no use: a copy of the row's size reached less than half of the
    machine's bandwidth, so that it mostly was a launch.
    """
    floor, time, info = measured_floor(row), median(row), row.extra_info or {}
    if floor is not None and floor[1] == "bytes" and 2 * info["copy_bytes_per_second"] < info.get(CEILING, 0):
        return None
    return None if floor is None or not time else floor[0] / time

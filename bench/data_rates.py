"""How many patches a second come of a way to them, with warm files and with cold ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.data_ways import Size, Way
from bench.page_cache import drop, files_of

MANY = 1 << 20
"""Batches, more than are ever waited for."""


def warm_rate(way: Way, size: Size) -> float:
    """Crops a second, of files that lie in the page cache."""
    for path in way.reads:
        for file in files_of(path):
            file.read_bytes()
    crops, seconds = counted(way.batches(MANY), size, least=_once(size), seconds=size.seconds)
    return crops / seconds


def cold_rate(way: Way, size: Size) -> float:
    """Crops a second, each of a file that does not lie in the page cache: all volumes once, as often as need be."""
    crops, seconds = 0, 0.0
    while not crops or seconds < size.seconds:
        for path in way.reads:
            drop(path)
        more, taken = counted(way.batches(_once(size)), size, least=_once(size), seconds=0)
        crops, seconds = crops + more, seconds + taken
    return crops / seconds


def _once(size: Size) -> int:
    return size.subjects // size.batch


def counted(batches: Iterable[Any], size: Size, *, least: int, seconds: float) -> tuple[int, float]:
    """Crops, and the seconds that they took to come, from the moment on when each worker is in its stride.

    That is, when it has given a batch more than it works ahead, and so been through all the memory that it passes
    batches on in. Workers take turns: what they do from there on is as much as comes of it, however far ahead they are.

    Args:
        batches: of a loader, taken at once.
        size: of a batch, and the number of workers.
        least: batches to wait for at least.
        seconds: to go on for at least.
    """
    arrivals: list[float] = []
    for _ in batches:
        arrivals.append(time.perf_counter())
        if len(arrivals) >= least and len(arrivals) > size.start and arrivals[-1] - arrivals[0] >= seconds:
            break
    return (len(arrivals) - size.start) * size.batch, arrivals[-1] - arrivals[size.start - 1]


def rates(found: Sequence[Way], size: Size) -> Mapping[str, Mapping[str, list[float]]]:
    """Crops a second of every way, warm and cold, one a round: all ways take turns, for no machine is always quiet."""
    measured: dict[str, dict[str, list[float]]] = {way.name: {"warm": [], "cold": []} for way in found}
    for round_ in range(size.rounds):
        for way in found:
            print(f"round {round_ + 1} of {size.rounds}: {way.name}", file=sys.stderr)
            measured[way.name]["cold"].append(cold_rate(way, size))
            measured[way.name]["warm"].append(warm_rate(way, size))
    return measured

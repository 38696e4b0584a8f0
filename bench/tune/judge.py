"""Whether a candidate is faster: by timings alone, so that the rule can be tested without a GPU.

A candidate replaces a configuration if, with times relative to it and averaged over the shapes of the class (each
counts alike, a launch of microseconds as much as a volume), it is faster by more than `LEAST_GAIN` and by more than
both their spreads, and if at no shape it is slower by as much. The fastest of those wins, the first among equals.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEAST_GAIN = 0.03
"""Timings of one call differ by so much from one process to the next."""

Timings = Mapping[str, Sequence[float]]
"""Seconds of a call, several samples, by shape."""


class Verdict(NamedTuple):
    """gain: share of the time saved, negative where it is slower; noise: both spreads; better: whether it counts."""

    gain: float
    noise: float
    better: bool


def spread(samples: Sequence[float]) -> float:
    """The interquartile range."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def verdict(present: Timings, candidate: Timings) -> Verdict:
    """The candidate against the present configuration, timed at the same shapes."""
    gains, noises = [], []
    for shape, samples in present.items():
        unit = statistics.median(samples)
        gains.append(1 - statistics.median(candidate[shape]) / unit)
        noises.append((spread(samples) + spread(candidate[shape])) / unit)
    gain, noise = statistics.mean(gains), statistics.mean(noises)
    loses = any(-single > max(LEAST_GAIN, own) for single, own in zip(gains, noises, strict=True))
    return Verdict(gain, noise, gain > max(LEAST_GAIN, noise) and not loses)


def winner(present: Timings, candidates: Sequence[Timings | None]) -> int | None:
    """Which candidate takes the present one's place; None if none does. A candidate without timings was discarded."""
    found = [(index, verdict(present, timings)) for index, timings in enumerate(candidates) if timings]
    better = [(index, v) for index, v in found if v.better]
    return max(better, key=lambda entry: (entry[1].gain, -entry[0]))[0] if better else None


def fastest(candidates: Sequence[Timings | None]) -> int | None:
    """Which takes least where there is none to compare with; the first among equals. Shapes count alike."""
    found = {
        index: {shape: statistics.median(samples) for shape, samples in timings.items()}
        for index, timings in enumerate(candidates)
        if timings
    }

    def relative(index: int) -> float:
        own = found[index].items()
        return statistics.mean(median / min(others[shape] for others in found.values()) for shape, median in own)

    return min(found, key=relative, default=None)

"""A mean over volumes with its uncertainty over subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS_AT_ONCE = 2**22  # subjects drawn at a time: 32 MB, however many resamples and subjects there are


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval; None where there is nothing to estimate them from."""

    mean: float
    low: float | None
    high: float | None


def mean_interval(
    values: Sequence[float], groups: Sequence[str], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `values` with a percentile bootstrap interval over groups (Efron & Tibshirani, 1993, chapter 13).

    Volumes of one subject resemble each other, so whole subjects are drawn with replacement, and the mean is that of
    all their volumes. The interval depends on the values and the seed, not on the order of volumes. Like every
    percentile interval it is a little narrow for few subjects: of 10 it holds the mean in about 90 % of cases, not 95.

    Args:
        values: one a volume.
        groups: whose volume each is.
        level: share of intervals that should hold the mean, between 0 and 1.
        resamples: how often subjects are drawn; the bounds' own error falls with its root.
        seed: of the draws.

    Returns:
        The mean, and bounds that are None for a single group or where a value is not finite; such a mean is then
        infinite or NaN too.

    Raises:
        ValueError: no values, as many groups as values not given, or an impossible level or number of resamples.
    """
    if not values or len(values) != len(groups):
        raise ValueError(
            f"{len(values)} values of {len(groups)} groups have no interval: one group a value, at least one"
        )
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie between 0 and 1 and resamples be positive, not {level} and {resamples}")
    # By group, then by value: sums do not depend on the order in which volumes come.
    ranked = sorted(zip(groups, values, strict=True))
    _, group, counts = np.unique([name for name, _ in ranked], return_inverse=True, return_counts=True)
    sorted_values = np.array([value for _, value in ranked], dtype=np.float64)
    mean = float(sorted_values.mean())
    if len(counts) == 1 or not np.isfinite(sorted_values).all():
        return Interval(mean, None, None)
    # About the mean: the sums of a resample then round like its deviation from it.
    sums = np.bincount(group, sorted_values - mean)
    means = mean + _resampled(sums, counts, resamples=resamples, seed=seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def _resampled(sums: np.ndarray, counts: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """The means of `resamples` draws of as many groups as there are."""
    generator = np.random.Generator(np.random.PCG64(seed))
    step = max(1, DRAWS_AT_ONCE // len(sums))
    means = []
    for start in range(0, resamples, step):
        drawn = generator.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)

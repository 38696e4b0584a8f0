"""Bootstrap intervals: against SciPy's, and how often they hold what they should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from decovae.metrics.bootstrap import Interval, mean_interval


def names(count: int, *, each: int = 1) -> list[str]:
    return [f"sub-{number:03d}" for number in range(count) for _ in range(each)]


def test_single_volumes_give_scipy_s_percentile_interval() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=40)
    ours = mean_interval(list(values), names(40), resamples=20_000)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2))
    # Both bounds are themselves random: ±0.4 % of the interval's width at 20,000 resamples. Two of them: ±2 %.
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.mean == pytest.approx(values.mean(), rel=1e-15)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02 * width)


def test_repeated_volumes_of_a_subject_add_no_certainty() -> None:
    values = np.random.default_rng(3).standard_normal(15)
    once = mean_interval(list(values), names(15))
    thrice = mean_interval(list(np.repeat(values, 3)), names(15, each=3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high), rel=1e-12)


def test_intervals_over_subjects_hold_the_mean_and_those_over_volumes_do_not() -> None:
    random = np.random.default_rng(4)
    held, held_by_volume, trials = 0, 0, 300
    for trial in range(trials):
        subjects = random.standard_normal((25, 1)) + 0.3 * random.standard_normal((25, 4))  # true mean 0
        values = list(subjects.ravel())
        held += contains(mean_interval(values, names(25, each=4), resamples=400, seed=trial), 0)
        held_by_volume += contains(mean_interval(values, names(100), resamples=400, seed=trial), 0)
    assert 0.89 <= held / trials <= 0.98  # 0.95 less what a percentile interval of 25 subjects lacks, ±0.025
    assert held_by_volume / trials < 0.8


def contains(interval: Interval, value: float) -> bool:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low <= value <= interval.high


def test_subjects_with_more_volumes_weigh_more_as_they_do_in_the_mean() -> None:
    values, groups = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    interval = mean_interval(values, groups)
    assert interval.mean == 0.25
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_the_order_of_volumes_is_no_matter_and_the_seed_is_all_chance() -> None:
    random = np.random.default_rng(5)
    values, groups = list(random.standard_normal(60)), names(20, each=3)
    shuffled = random.permutation(60)
    interval = mean_interval(values, groups, seed=7)
    assert mean_interval([values[i] for i in shuffled], [groups[i] for i in shuffled], seed=7) == interval
    assert mean_interval(values, groups, seed=8) != interval


def test_many_subjects_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(6).standard_normal(50))
    whole = mean_interval(values, names(50), resamples=301)
    monkeypatch.setattr("decovae.metrics.bootstrap.DRAWS_AT_ONCE", 1000)
    assert mean_interval(values, names(50), resamples=301) == whole


def test_a_wider_level_gives_a_wider_interval() -> None:
    values = list(np.random.default_rng(7).standard_normal(30))
    narrow, wide = (mean_interval(values, names(30), level=level) for level in (0.5, 0.99))
    assert wide.low is not None
    assert narrow.low is not None
    assert wide.low < narrow.low <= narrow.mean


def test_where_there_is_nothing_to_estimate_from_there_are_no_bounds() -> None:
    assert mean_interval([1.0, 3.0], ["a", "a"]) == Interval(2.0, None, None)
    assert mean_interval([1.0], ["a"]) == Interval(1.0, None, None)
    assert mean_interval([1.0, float("inf")], ["a", "b"]) == Interval(float("inf"), None, None)
    assert np.isnan(mean_interval([1.0, float("nan")], ["a", "b"]).mean)
    assert mean_interval([2.0, 2.0], ["a", "b"]) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("values", "groups", "options"),
    [
        ([], [], {}),
        ([1.0], ["a", "b"], {}),
        ([1.0, 2.0], ["a", "b"], {"level": 1.0}),
        ([1.0, 2.0], ["a", "b"], {"resamples": 0}),
    ],
)
def test_wrong_arguments_are_refused(values: list[float], groups: list[str], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"groups|level"):
        mean_interval(values, groups, **options)  # type: ignore[arg-type]

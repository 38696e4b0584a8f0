"""Work ahead comes back in order, in the threads it belongs to, and not too far ahead."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from decovae.evaluation.stopwatch import Stopwatch
from decovae.generation.ahead import worked_ahead


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_results_come_in_order(on_cpu: bool, threads: int, count: int) -> None:
    def load(place: int) -> int:
        time.sleep(0.002 * (place % 3))
        return place * 10

    results = worked_ahead(
        range(count),
        load,
        lambda place, loaded: loaded + place,
        lambda place, computed: (place, computed),
        threads=threads,
        on_cpu=on_cpu,
    )
    assert list(results) == [(place, 11 * place) for place in range(count)]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_the_caller_feeds_a_gpu(on_cpu: bool) -> None:
    here = threading.current_thread()
    computed_in: set[threading.Thread] = set()
    others: set[threading.Thread] = set()

    def compute(place: int, loaded: None) -> None:
        computed_in.add(threading.current_thread())

    list(
        worked_ahead(
            range(6),
            lambda place: others.add(threading.current_thread()),
            compute,
            lambda place, computed: others.add(threading.current_thread()),
            threads=2,
            on_cpu=on_cpu,
        )
    )
    assert here not in others
    assert (computed_in == {here}) is not on_cpu
    assert (here in computed_in) is not on_cpu


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_slow_reader_bounds_what_is_held(on_cpu: bool) -> None:
    loaded: list[int] = []
    results = worked_ahead(
        range(100), loaded.append, lambda place, _: place, lambda place, _: place, threads=2, on_cpu=on_cpu
    )
    with closing(results):
        for taken in range(10):
            assert next(results) == taken
            time.sleep(0.005)
            assert len(loaded) <= taken + 1 + 2 * 2 + 2


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("step", ["load", "compute", "finish"])
def test_an_error_ends_it(on_cpu: bool, step: str) -> None:
    def failing(name: str) -> None:
        if name == step:
            raise ValueError(name)

    results = worked_ahead(
        range(5),
        lambda place: failing("load"),
        lambda place, loaded: failing("compute"),
        lambda place, computed: failing("finish"),
        threads=2,
        on_cpu=on_cpu,
    )
    with pytest.raises(ValueError, match=step):
        list(results)


def test_seconds_add_up_by_part() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.time("sleep"):
            time.sleep(0.01)
    with watch.time("nothing"):
        pass
    assert 0.02 <= watch.seconds["sleep"] < 1
    assert watch.seconds["nothing"] < watch.seconds["sleep"]

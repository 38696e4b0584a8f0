"""Volumes worked on side by side: threads load, and on the CPU do all of it; a GPU is fed by the caller's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Result = TypeVar("Result")


def worked_ahead(
    places: Sequence[int],
    load: Callable[[int], Loaded],
    compute: Callable[[int, Loaded], Computed],
    finish: Callable[[int, Computed], Result],
    *,
    threads: int,
    on_cpu: bool,
) -> Generator[Result, None, None]:
    """What is made of each place, in order, while threads work ahead.

    Args:
        places: what to work on.
        load: the first step; called in any thread.
        compute: the step that needs the device; called in any thread on the CPU, in the caller's for a GPU.
        finish: the last step; called in any thread.
        threads: at least 1.
        on_cpu: where the networks are.
    """
    loading: deque[tuple[int, Future[Loaded]]] = deque()
    finishing: deque[Future[Result]] = deque()
    remaining = iter(places)
    pool = ThreadPoolExecutor(threads)

    def whole(place: int) -> Result:
        return finish(place, compute(place, load(place)))

    def start(place: int) -> None:
        if on_cpu:
            finishing.append(pool.submit(whole, place))
        else:
            loading.append((place, pool.submit(load, place)))

    try:
        while True:
            while len(loading) + len(finishing) < 2 * threads and (place := next(remaining, None)) is not None:
                start(place)
            if loading:
                place, loaded = loading.popleft()
                finishing.append(pool.submit(finish, place, compute(place, loaded.result())))
            if not loading and not finishing:
                return
            if finishing and (on_cpu or not loading or finishing[0].done() or len(finishing) >= threads):
                yield finishing.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

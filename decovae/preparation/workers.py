"""A function of many things, each in one of several processes; a process that dies takes nothing but its own life."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from decovae.errors import InputError, RunError
from decovae.preparation.worker import Death, Worker, attempt
from decovae.threads import one_thread, usable_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")

MEMORY = 1 << 30
"""Bytes that a process is expected to take, at the most usual sizes of volumes."""


def usual_workers() -> int:
    """A process for each CPU that this one may use, fewer where memory is short."""
    return max(1, min(usable_cpus(), _free_memory() // MEMORY))


def for_each(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int
) -> Generator[tuple[Item, Result | InputError], None, None]:
    """`function` of every item, as they get done, an `InputError` in the place of what it raised.

    Threads of torch do not take part: where sums are split among them, their number would show in the last bits.

    Args:
        function: of a module, or a `functools.partial` of one, so that it can be sent to a process.
        items: each is sent when a process is free for it.
        workers: processes; 0 for none but this one, which nothing protects then.

    Yields:
        An item and its result. The item whose process died is tried once more, after all others and alone; if that
        process dies too, the error says so.

    Raises:
        RunError: what `function` raises of that kind, or no process can be started.
    """
    if workers <= 0:
        for item in items:
            with one_thread():
                result = attempt(function, item)
            yield item, _or_raise(result)
        return
    suspects: list[Item] = []
    with _Pool(function) as pool:
        for item, result in pool.run(items, workers):
            if isinstance(result, Death):
                suspects.append(item)
            else:
                yield item, _or_raise(result)
        for suspect in suspects:
            for item, result in pool.run([suspect], 1):
                if isinstance(result, Death):
                    result = InputError(f"Its process {result.how}, also when nothing ran beside it.")
                yield item, _or_raise(result)


def _or_raise(result: Any) -> Any:
    if isinstance(result, RunError):
        raise result
    return result


class _Pool(contextlib.ExitStack, Generic[Item]):
    """Processes that are started when they are needed, and are gone at the end."""

    def __init__(self, function: Callable[[Item], Any]) -> None:
        super().__init__()
        self.function = function
        self.idle: list[Worker[Item]] = []
        self.busy: dict[Any, tuple[Worker[Item], Item]] = {}
        self.callback(self._end)

    def run(self, items: Sequence[Item], workers: int) -> Iterator[tuple[Item, Any]]:
        """Each item with its answer, or the `Death` of the process that had it; at most `workers` at a time."""
        waiting = deque(items)
        while waiting or self.busy:
            while waiting and len(self.busy) < workers:
                worker = self.idle.pop() if self.idle else self._start()
                item = waiting.popleft()
                worker.give(item)
                self.busy[worker.connection] = worker, item
            for connection in wait(list(self.busy)):
                worker, item = self.busy.pop(connection)
                answer = worker.answer()
                if not isinstance(answer, Death):
                    self.idle.append(worker)
                yield item, answer

    def _start(self) -> Worker[Item]:
        try:
            worker = Worker(self.function)
        except OSError as error:
            raise RunError(f"No process can be started ({error.strerror or error}); give fewer --workers.") from error
        if isinstance(death := worker.answer(), Death):
            raise RunError(f"A process of --workers {death.how} before it began; try --workers 0.")
        return worker

    def _end(self) -> None:
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            worker.process.kill()
            worker.end()


def _free_memory() -> int:
    """Bytes that may be had at the moment, as far as the system says."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 1 << 62
    with contextlib.suppress(OSError, ValueError):  # the share of a container
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return free

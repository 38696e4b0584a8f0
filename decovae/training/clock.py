"""Where the time of a step goes: a timeline of marks, each the beginning of a part that lasts until the next mark.

On CUDA a mark is an event on the current stream, so that nobody waits for the GPU and a part counts as long as it holds
the GPU up: a loader that is done before the GPU has worked off what was launched costs nothing. On the CPU it is a
reading of the clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import Variable

Phase = Literal["data", "forward", "backward", "communication", "optimizer"]


OTHER = "other"
"""What a step does outside every phase."""

PHASES: tuple[str, ...] = ("data", "forward", "backward", "communication", "optimizer", OTHER)


class StepClock:
    """Adds up the seconds of each phase, between the first phase that is entered and `read`.

    What is inside another phase counts for itself alone: seconds are never counted twice, and their sum is the whole.

    Args:
        device: whose time it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._timeline: _HostTimeline | _StreamTimeline
        self._timeline = _StreamTimeline() if device.type == "cuda" else _HostTimeline()
        self._current: str | None = None
        self._read = dict.fromkeys(PHASES, 0.0)

    @property
    def running(self) -> bool:
        """Whether a phase was entered since the last reading."""
        return self._current is not None

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count what happens within it as ``name``."""
        outer = self._current or OTHER
        self.mark(name)
        try:
            yield
        finally:
            self.mark(outer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens within it."""
        outer = self._current
        self.mark(None)
        try:
            yield
        finally:
            self.mark(outer)

    def mark(self, name: str | None) -> None:
        """From here on, what happens counts as ``name``, or not at all."""
        self._current = name
        self._timeline.mark(name)

    def backward(self, loss: Tensor, *, waits: bool) -> None:
        """Run a backward pass, as phase "backward".

        Args:
            loss: scalar.
            waits: count as "communication" what it does after its last gradient is there: sharded modules then wait
                until gradients have been reduced. On the CPU they wait inside the backward pass, where collectives are
                not told from arithmetic.
        """
        with self.phase("backward"):
            if waits:
                # The engine calls what is queued in the order in which it was queued, and this comes first: sharded
                # modules queue their wait when their own gradient arrives, after the loss's.
                def queue(_: Tensor) -> None:
                    Variable._execution_engine.queue_callback(lambda: self.mark("communication"))

                loss.register_hook(queue)
            loss.backward()

    def step_done(self) -> None:
        """Bring in what is known by now, so that a timeline does not grow between readings."""
        self._timeline.settle(wait=False)

    def totals(self) -> dict[str, float]:
        """Seconds of each phase since the start, after the device has done what it was given."""
        self.mark(self._current)
        self._timeline.settle(wait=True)
        return dict(self._timeline.seconds)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading, which end here; the next phase begins anew."""
        now = self.totals()
        self.mark(None)
        before, self._read = self._read, now
        return {name: seconds - before[name] for name, seconds in now.items()}


class _HostTimeline:
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = 0.0
        self._name: str | None = None

    def mark(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._name is not None:
            self.seconds[self._name] += now - self._since
        self._since, self._name = now, name

    def settle(self, *, wait: bool) -> None:
        """Nothing is outstanding."""


class _StreamTimeline:
    def __init__(self, event: Callable[[], torch.cuda.Event] | None = None) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._spare: list[torch.cuda.Event] = []
        self._marks: deque[tuple[torch.cuda.Event, str | None]] = deque()

    def mark(self, name: str | None) -> None:
        event = self._spare.pop() if self._spare else self._event()
        event.record()
        self._marks.append((event, name))

    def settle(self, *, wait: bool) -> None:
        """Count the marks that the GPU has passed; all of them, if need be after waiting for it."""
        marks = self._marks
        if wait and marks:
            marks[-1][0].synchronize()
        while len(marks) > 1 and (wait or marks[1][0].query()):
            event, name = marks.popleft()
            if name is not None:
                self.seconds[name] += event.elapsed_time(marks[0][0]) / 1000
            self._spare.append(event)

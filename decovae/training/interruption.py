"""Ctrl-C, SIGTERM and SIGUSR1 as a request to stop after the current step."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUESTS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks for a stop: people, launchers and schedulers; SLURM's warning before it preempts is what its user chooses,
SIGUSR1 by custom."""

AGAIN: dict[int, float] = {signal.SIGINT: 1.0, signal.SIGTERM: 180.0}
"""Seconds after the first request from which on the signal means at once; before, it is an echo of the first: SLURM
sends SIGTERM when a job's grace begins and when it is over, and torchrun passes on what it handles, a second Ctrl-C as
SIGTERM. Who cannot wait sends SIGKILL."""


class Interrupted(Exception):
    """A run that stopped on request, its checkpoint written."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} at step {step}")
        self.exit_code = 128 + signal_number


class StopRequest:
    """The first signal that asked for a stop, if any."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def stop_requests(*, announce: bool) -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying of them.

    A second Ctrl-C acts as it would have without this, and so does a SIGTERM that comes much later than the first.
    torchrun dies of SIGUSR1 itself unless it is told to pass it on (``--signals-to-handle``).

    Args:
        announce: say on standard error that the first one was noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only a main thread may set handlers
        return
    previous = {number: signal.getsignal(number) for number in REQUESTS}
    noted_at = 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal noted_at
        if request:
            if time.monotonic() - noted_at > AGAIN.get(number, math.inf):
                signal.signal(number, previous[number] or signal.SIG_DFL)
                signal.raise_signal(number)
            return
        request.signal_number, noted_at = number, time.monotonic()
        if announce:
            # Under torchrun a second Ctrl-C never comes here.
            more = b"." if "TORCHELASTIC_RUN_ID" in os.environ else b"; Ctrl-C once more stops at once."
            # Straight to the file: a handler may run in the middle of anything else that prints.
            os.write(2, b"\nStopping after this step, with a checkpoint" + more + b"\n")

    for number in REQUESTS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C and schedulers reach loader processes too: the training process ends them when it is done."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)

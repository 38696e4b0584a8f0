"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
    """Note SIGINT and SIGTERM instead of dying of them; a second one acts as it would have without this.

    Args:
        announce: say on standard error that the first one was noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only a main thread may set handlers
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        if announce:
            # Straight to the file: a handler may run in the middle of anything else that prints.
            os.write(2, b"\nStopping after this step, with a checkpoint; once more stops at once.\n")
        for noted, handler in previous.items():
            signal.signal(noted, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""How far long work is, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINES = 10
"""Lines about the whole of the work where there is no terminal, if it is quick."""

LONGEST_SILENCE = 30.0
"""Seconds after which the next piece is worth a line of its own."""


class Progress:
    """A bar over `total` pieces of work; silent where not `visible`. A context manager, for any number of threads.

    Without a terminal `advance` prints a line at every tenth of the work, and after half a minute without one; leaving
    prints where the work ended, if that was not said.

    Args:
        title: what is being done, one or two words.
        total: how many pieces there are.
        visible: whether this process is the one to say so.
    """

    def __init__(self, title: str, total: int, *, visible: bool) -> None:
        self._console = Console(stderr=True, quiet=not visible)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not visible or not self._console.is_terminal,
        )
        self._title, self._total, self._done = title, total, 0
        self._task = self._bar.add_task(title, total=total)
        self._lock = threading.RLock()
        self._said, self._when = 0, monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self.milestone()

    def advance(self) -> None:
        """One more piece is done."""
        with self._lock:
            self._done += 1
            self._bar.advance(self._task)
            tenths = LINES * self._done // self._total - LINES * self._said // self._total
            if tenths > 0 or monotonic() - self._when >= LONGEST_SILENCE:
                self.milestone()

    def milestone(self) -> None:
        """Print a line on where the work stands, unless that was said before, or there is a bar that shows it."""
        with self._lock:
            if self._done > self._said and not self._console.is_terminal:
                self.say(f"{self._title}: {self._done} of {self._total}")
                self._said, self._when = self._done, monotonic()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

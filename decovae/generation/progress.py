"""How far long work is, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar over `total` pieces of work; silent where not `visible`. A context manager.

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

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One more piece is done."""
        self._done += 1
        self._bar.advance(self._task)

    def milestone(self) -> None:
        """Print a line on where the work stands, unless there is a bar that shows it."""
        if not self._console.is_terminal:
            self.say(f"{self._title}: {self._done} of {self._total}")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

"""What a person sees of a run while it trains: a bar with the losses on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A progress bar over ``steps``; silent on all processes but one."""

    def __init__(self, steps: int, *, visible: bool) -> None:
        self._console = Console(quiet=not visible)
        # Without a terminal a bar would be a page of escape codes: lines from `say` stand for it.
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            disable=not visible or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, losses="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin_at(self, step: int) -> None:
        """That many steps are done already."""
        self._bar.update(self._task, completed=step)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.advance(self._task)

    def show(self, losses: Mapping[str, float]) -> None:
        """Put the losses behind the bar."""
        shown = (f"{name} {value:.3g}" for name, value in losses.items() if not name.startswith("gradient_norm"))
        self._bar.update(self._task, losses="  ".join(shown))

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)

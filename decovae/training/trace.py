"""A torch.profiler trace of a few training steps, and in words where their time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from decovae.files import write_text

FOLDER = "profile"
OPERATORS = 25
"""Operators in the summary."""


class Trace:
    """One trace of a run: ``profile/rank0.json.gz`` for Perfetto or chrome://tracing, and ``profile/summary.txt``.

    Every process writes a trace of its own, the main one the summary.

    Args:
        folder: the run's.
        device: of this process.
        rank: of this process.
        first: number of the first step in it, from 1 on.
        steps: in it.
        seconds: says how many seconds each phase has taken so far, the device waited for.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        rank: int,
        *,
        first: int,
        steps: int,
        seconds: Callable[[], dict[str, float]],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.device, self.rank = folder / FOLDER, device, rank
        self.first, self.steps, self._seconds, self._say = first, steps, seconds, say
        self._profiler: Any = None
        self._done = 0
        self._before: dict[str, float] = {}

    def part(self, name: str) -> AbstractContextManager[object]:
        """Name what happens within it in the trace, if one is being made."""
        return nullcontext() if self._profiler is None else record_function(name)

    def after(self, step: int) -> None:
        """Begin or end, where it is time to after so many steps."""
        if self._profiler is None:
            if step == self.first - 1:
                self._begin()
            return
        self._done += 1
        if self._done == self.steps:
            self.end()

    def end(self) -> None:
        """Write what there is, if anything; a disk that takes nothing is said and no more."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        after = self._seconds()
        profiler.stop()
        if not self._done:
            return
        split = {name: (after[name] - self._before[name]) / self._done for name in after}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / f"rank{self.rank}.json.gz"))
            if self.rank == 0:
                steps = f"Steps {self.first} to {self.first + self._done - 1}"
                write_text(self.folder / "summary.txt", summary(profiler, split, steps=steps, device=self.device))
        except (OSError, RuntimeError) as error:  # the profiler writes by itself, and has errors of its own
            self._say(f"warning: the trace cannot be written below {self.folder} ({error}); training goes on.")
        else:
            self._say(f"steps {self.first} to {self.first + self._done - 1} were traced: {self.folder}")

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._before = self._seconds()
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()


def summary(profiler: Any, split: Mapping[str, float], *, steps: str, device: torch.device) -> str:
    """The split of a step by phase, and the operators that take most time by themselves.

    Args:
        profiler: that has stopped.
        split: seconds of each phase in a step.
        steps: what was traced.
        device: whose time the operators are sorted by.
    """
    whole = sum(split.values())
    lines = [
        f"{steps} under the profiler, {whole:.4f} s each. Tracing makes steps longer: shares say more than seconds.",
        "",
        f"{'phase':<16}{'seconds':>10}{'share':>8}",
        *(f"{name:<16}{seconds:>10.4f}{seconds / (whole or 1.0):>8.1%}" for name, seconds in split.items()),
        "",
        profiler.key_averages().table(
            sort_by="self_cpu_time_total" if device.type == "cpu" else "self_device_time_total",
            row_limit=OPERATORS,
            max_name_column_width=60,
        ),
    ]
    return "\n".join(lines) + "\n"

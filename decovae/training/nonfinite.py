"""Steps left out since a loss or a gradient was not finite: whose samples they were, and the samples themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decovae.errors import RunError
from decovae.files import write_atomically
from decovae.runtime import Runtime

FOLDER = "nonfinite"

OF_ALL = "gradient_norm_"
"""What the names of figures begin with that are equal on every process: they accuse none."""

SHOWN = 8
"""Most subjects, samples and files that a sentence names."""


@dataclass(frozen=True)
class Skip:
    """A step that was left out, equal on every process.

    Attributes:
        step: counted from 1, as logs count.
        broken: terms and gradient norms that are not finite.
        subjects: whose samples were in the batches that did it, in order of rank.
        positions: those samples' places in the order of samples.
        dumps: files that hold the batches.
        trouble: why a batch could not be written, or None.
        count: steps left out in the whole run, this one too.
    """

    step: int
    broken: tuple[str, ...]
    subjects: tuple[str, ...]
    positions: tuple[int, ...]
    dumps: tuple[str, ...]
    trouble: str | None
    count: int

    @property
    def what(self) -> str:
        """What is not finite."""
        return ", ".join(self.broken) or "a loss"

    @property
    def whose(self) -> str:
        """Whose batch it was, and where it lies."""
        words = _shortened(self.subjects) or "unnamed subjects"
        if self.positions:
            words += f" (samples {_shortened(self.positions)})"
        if self.dumps:
            words += f", dumped to {_shortened(self.dumps)}"
        if self.trouble:
            words += f", which could not be dumped everywhere ({self.trouble})"
        return words

    @property
    def sentence(self) -> str:
        """For the one who watches."""
        return f"warning: step {self.step} is left out, its {self.what} not finite; the batch was of {self.whose}."

    @property
    def figures(self) -> dict[str, Any]:
        """For the log."""
        return {
            "skipped_steps": self.count,
            "skipped_for": list(self.broken),
            "skipped_subjects": list(self.subjects),
            "skipped_positions": list(self.positions),
        }


class Skipped:
    """The steps that a run left out.

    Args:
        folder: the run's, the same on every process.
        runtime: of this process.
        limit: steps that may be left out.

    Attributes:
        count: steps left out so far; a run that is resumed sets what its checkpoint says.
    """

    def __init__(self, folder: Path, runtime: Runtime, *, limit: int) -> None:
        self.folder, self.runtime, self.limit = folder, runtime, limit
        self.count = 0
        self._last: Skip | None = None

    def add(self, step: int, terms: Mapping[str, Tensor | float], batches: Sequence[Mapping[str, Any]]) -> Skip:
        """Count a step, dump the batches that did it, and tell every process whose they were; every process calls this.

        Those are the batches of processes in which a term is not finite, or of all where only gradients are not.

        Args:
            step: counted from 1.
            terms: of this process's losses, and gradient norms, which are those of all.
            batches: of this process, one an accumulation.
        """
        values = {name: float(value) for name, value in terms.items()}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        accused = any(not name.startswith(OF_ALL) for name in broken)
        nobody = not any(self.runtime.gather(accused))
        dump, trouble, subjects, positions = None, None, [], []
        if accused or nobody:
            subjects = [str(subject) for batch in batches for subject in batch.get("subject", ())]
            positions = [int(position) for batch in batches for position in batch.get("position", ())]
            try:
                dump = str(dump_batches(self.folder, step, self.runtime.rank, batches, values))
            except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
                trouble = str(error).strip().splitlines()[-1]
        gathered = self.runtime.gather((broken, subjects, positions, dump, trouble))
        self.count += 1
        self._last = Skip(
            step=step,
            broken=tuple(dict.fromkeys(name for names, *_ in gathered for name in names)),
            subjects=tuple(dict.fromkeys(subject for _, found, *_ in gathered for subject in found)),
            positions=tuple(position for _, _, found, *_ in gathered for position in found),
            dumps=tuple(path for *_, path, _ in gathered if path is not None),
            trouble=next((text for *_, text in gathered if text is not None), None),
            count=self.count,
        )
        return self._last

    def check(self) -> None:
        """End the run if more steps than the limit were left out.

        Raises:
            RunError: on all processes alike, naming the last batch's subjects and where it lies.
        """
        if self._last is None or self.count <= self.limit:
            return
        steps = "1 step was" if self.count == 1 else f"{self.count} steps were"
        error = RunError(
            f"Step {self._last.step}: {self._last.what} not finite; {steps} left out, more than --skip-limit "
            f"{self.limit}, and the last good checkpoint is kept. The last batch was of {self._last.whose}. Look at it "
            "or lower --optimizer.learning-rate, or the weight of the term that grows."
        )
        error.on_all_processes = True
        raise error


def dump_batches(
    folder: Path, step: int, rank: int, batches: Sequence[Mapping[str, Any]], terms: Mapping[str, float]
) -> Path:
    """Write ``nonfinite/step-00000012-rank0.pt`` below the run's ``folder``; its path.

    ``torch.load(path, weights_only=True)`` gives ``{"step", "rank", "terms": {name: float}, "batches": [{…}]}``, the
    batches as the loader made them: tensors, on the CPU, and lists of strings.

    Raises:
        OSError, RuntimeError: it cannot be written.
    """
    path = folder / FOLDER / f"step-{step:08d}-rank{rank}.pt"
    content = {
        "step": step,
        "rank": rank,
        "terms": dict(terms),
        "batches": [{name: _plain(value) for name, value in batch.items()} for batch in batches],
    }
    write_atomically(path, lambda file: torch.save(content, file))
    return path


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _shortened(values: Sequence[object]) -> str:
    more = len(values) - SHOWN
    return ", ".join(map(str, values[:SHOWN])) + (f" and {more} more" if more > 0 else "")

"""Work that every process of a run has a part in, where one of them may fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from decovae.errors import InputError, RunError
from decovae.runtime import Runtime, raise_first

Result = TypeVar("Result")


def gathered(runtime: Runtime, action: Callable[[], list[tuple[int, Result]]]) -> list[Result]:
    """The results of all processes, in the order of their places, the same on every process.

    Args:
        runtime: the processes, all of which call this.
        action: does this process's part; returns results with their places, which are sent to the other processes.

    Raises:
        InputError, RunError: what `action` raised on one process is raised on all, so that none waits for it; memory
            that ran out on a GPU is a RunError.
    """
    mine: list[tuple[int, Result]] = []
    failure: InputError | RunError | None = None
    try:
        mine = action()
    except (InputError, RunError) as error:
        failure = error
    except torch.OutOfMemoryError:
        failure = RunError("the GPU ran out of memory; end what else uses it (see nvidia-smi), or give --device cpu.")
    outcomes = runtime.gather((mine, failure))
    raise_first(raised for _, raised in outcomes)
    return [result for _, result in sorted((pair for part, _ in outcomes for pair in part), key=lambda pair: pair[0])]

"""What the parts of an evaluation take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by what they went into; of one volume, so that those of volumes side by side can be added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str, *, on: torch.device | None = None) -> Iterator[None]:
        """Add what happens inside; `on` a GPU until that is done with it, which others of its threads wait for too."""
        start = time.perf_counter()
        yield
        if on is not None and on.type == "cuda":
            torch.cuda.synchronize(on)
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

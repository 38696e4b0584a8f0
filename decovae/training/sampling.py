"""Which positions in the order of samples a process takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """Lists of positions, one a batch of this process.

    Each global batch is a run of consecutive positions, cut into one piece a process, so that the samples of a step do
    not depend on how many processes share them.
    """

    start: int
    count: int
    size: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.count):
            first = self.start + (batch * self.world + self.rank) * self.size
            yield list(range(first, first + self.size))

    def __len__(self) -> int:
        return self.count

"""Batches from a loader's worker to the training process, through a few pieces of shared memory that are used in turn.

A tensor that torch passes on goes into new shared memory, whose pages the system has to make, and its descriptor
through a socket: for a batch of patches that takes longer than all else that a worker does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Parcel(NamedTuple):
    """A tensor that lies in shared memory.

    Attributes:
        worker: who put it there.
        slot: which of that worker's pieces of memory it lies in.
        memory: that piece, with the first tensor in it; later ones are found where it was.
    """

    worker: int
    slot: int
    memory: Tensor | None


class Outbox:
    """A worker's pieces of shared memory; outside of workers, ordinary memory.

    Args:
        slots: pieces, of which each is written again after as many tensors: one more than a worker works ahead, if the
            training process has copied a tensor when it asks for the next.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._memory: dict[int, Tensor] = {}
        self._slot = -1
        self._is_new = False

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for the next tensor, with what was left in it."""
        if get_worker_info() is None:
            return torch.empty(shape, dtype=dtype)
        self._slot = (self._slot + 1) % self.slots
        memory = self._memory.get(self._slot)
        self._is_new = memory is None or memory.shape != torch.Size(shape) or memory.dtype != dtype
        if self._is_new:
            self._memory[self._slot] = torch.empty(shape, dtype=dtype).share_memory_()
        return self._memory[self._slot]

    def parcel(self, tensor: Tensor) -> Tensor | Parcel:
        """What is to be sent of a tensor, which may lie elsewhere than in the room that was made for it.

        Outside of workers that is the tensor.
        """
        worker = get_worker_info()
        if worker is None:
            return tensor
        memory = self._memory[self._slot]
        if tensor is not memory:
            memory.copy_(tensor)
        return Parcel(worker.id, self._slot, memory if self._is_new else None)


class Inbox:
    """The training process's side, for one set of workers."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], Tensor] = {}

    def copy(self, parcel: Parcel) -> Tensor:
        """The tensor of a parcel, in memory of its own; a worker's parcels have to come in their order."""
        if parcel.memory is not None:
            self._memory[parcel.worker, parcel.slot] = parcel.memory
        return self._memory[parcel.worker, parcel.slot].clone()

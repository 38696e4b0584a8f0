"""Where this process runs: its device, and the other processes of the run."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decovae.errors import InputError, RunError
from decovae.rendezvous import meet

Result = TypeVar("Result")
Module = TypeVar("Module", bound=nn.Module)

LONGEST_WAIT = datetime.timedelta(hours=2)
"""How long processes wait for each other: one checks tens of thousands of volumes while the others stand by."""


@dataclass(frozen=True)
class Runtime:
    """This process among the run's processes.

    Attributes:
        device: where it computes.
        rank: its number among all processes.
        local_rank: its number among those of its node.
        world: how many processes there are.
        group: all of them; None in a run of one process.
        local_worlds: of each process, in order of rank, the number of the node it is on and the processes there; all
            are on one node where this is not given.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    local_worlds: tuple[tuple[int, int], ...] = ()

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Processes of each node, in order of nodes."""
        sizes = dict(self.local_worlds or ((0, self.world),))
        return tuple(sizes[node] for node in sorted(sizes))

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return len(self.node_sizes)

    @property
    def local_world(self) -> int:
        """Processes of this node."""
        return self.local_worlds[self.rank][1] if self.local_worlds else self.world

    @property
    def main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def place(self, module: Module) -> Module:
        """Move a module to the device, in place, and return it."""
        return module.to(self.device)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over processes."""
        if self.group is None:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world

    def maximum(self, values: Tensor) -> Tensor:
        """Largest of each element of a tensor over processes."""
        if self.group is None:
            return values
        largest = values.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return largest

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank, on every process."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, action: Callable[[], Result]) -> Result:
        """What ``action`` returns on the main process, on all; what it raises there is raised on all.

        Whatever depends on the file system is decided this way: processes on different machines may see it differently.
        """
        return self._while_others_wait(action, self.main)

    def fill_caches(self, action: Callable[[], object]) -> None:
        """Run ``action`` on one process of each node while the others wait; they then find what it cached.

        What it raises is raised on all. Alone, a process has nobody to fill caches for.
        """

        def cache() -> None:
            action()  # its result stays here: only what it cached is for the others

        if self.world > 1:
            self._while_others_wait(cache, self.local_rank == 0)

    def _while_others_wait(self, action: Callable[[], Result], mine: bool) -> Result:
        result: Result | None = None
        failure: Exception | None = None
        if mine:
            try:
                result = action()
            except Exception as error:
                failure = error
        outcomes = self.gather((result, failure))
        raise_first(raised for _, raised in outcomes)
        value: Result = outcomes[0][0]
        return value


def raise_first(gathered: Iterable[Exception | None]) -> None:
    """Raise the first of what processes raised, which all of them now do alike; nothing where none of them did.

    Args:
        gathered: of each process what it raised, or None, as `Runtime.gather` has it.
    """
    for raised in gathered:
        if raised is not None:
            if isinstance(raised, InputError | RunError):
                raised.on_all_processes = True
            raise raised


@contextmanager
def start_runtime(device: str = "auto") -> Iterator[Runtime]:
    """Join the processes that torchrun started, or run alone.

    Raises:
        InputError: if CUDA is asked for and absent, or a node has fewer GPUs than processes.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu or install a driver.")
    kind = "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node: process {local_rank + 1} of this node has no GPU, there are "
                f"{torch.cuda.device_count()}; start as many processes as GPUs, or use --device cpu."
            )
        local = torch.device("cuda", local_rank)
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        local = torch.device("cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Runtime(local)
        return
    store, rank, world = meet(LONGEST_WAIT)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=LONGEST_WAIT,
        device_id=local if kind == "cuda" else None,
    )
    alike = Runtime(local, dist.get_rank(), local_rank, world, dist.group.WORLD)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    node = int(os.environ.get("GROUP_RANK", alike.rank // local_world))
    yield replace(alike, local_worlds=tuple(alike.gather((node, local_world))))
    # After an error this would wait for what the others do not take part in any more; the process ends anyway.
    dist.destroy_process_group()

"""Several processes of one test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing as mp

from bench.processes import free_port as free_port
from decovae.process import leave
from decovae.runtime import Runtime, start_runtime


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Run `function(rank, *arguments)` in a process for each rank, with WORLD_SIZE set; what one raises is raised here.

    They end as scripts of several processes do, since a thread of gloo can abort an ordinary end.
    """
    mp.spawn(_run, args=(function, arguments, world), nprocs=world)


def _run(rank: int, function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    function(rank, *arguments)
    leave(0)


@contextmanager
def joined(rank: int, port: int) -> Iterator[Runtime]:
    """What `start_runtime` gives a process that `spawn` began, over gloo, all on one node."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with start_runtime("cpu") as runtime:
        yield runtime

"""Several processes of one test."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from decovae.process import leave


def spawn(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """Run `function(rank, *arguments)` in a process for each rank, with WORLD_SIZE set; what one raises is raised here.

    They end as scripts of several processes do, since a thread of gloo can abort an ordinary end.
    """
    mp.spawn(_run, args=(function, arguments, world), nprocs=world)


def _run(rank: int, function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    function(rank, *arguments)
    leave(0)

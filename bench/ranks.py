"""Several processes on this machine that work together over gloo, for what is measured or counted among them."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from decovae.process import leave
from decovae.runtime import start_runtime


def among(world: int, function: Callable[..., Any], *arguments: Any, node: int | None = None) -> Any:
    """What `function(runtime, *arguments)` returns on the main one of so many processes, each of one thread.

    Args:
        world: processes; one is a process of its own, too.
        function: of a module, so that another process finds it.
        arguments: that can be pickled, as the result.
        node: processes that take themselves for those of one machine; None is all.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = Path(folder) / "result.pickle"
        spawn(_run, args=(world, node or world, port, file, function, arguments), nprocs=world)
        return pickle.loads(file.read_bytes())


def _run(
    rank: int, world: int, node: int, port: int, file: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank % node), "LOCAL_WORLD_SIZE": str(node)}
    os.environ |= {"GROUP_RANK": str(rank // node), "GROUP_WORLD_SIZE": str(world // node)}
    torch.set_num_threads(1)
    with start_runtime("cpu") as runtime:
        result = function(runtime, *arguments)
        if runtime.main:
            file.write_bytes(pickle.dumps(result))
    leave(0)

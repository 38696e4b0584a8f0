"""Where the processes of a run find each other, also when they are started again."""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from decovae.errors import RunError

POLL = 0.01


def meet(timeout: datetime.timedelta) -> tuple[dist.distributed_c10d.PrefixStore, int, int]:
    """The store through which the processes that torchrun started connect, this process's rank, and how many there are.

    torchrun keeps one store as long as it lives. After a restart there are in it what processes that died have left:
    addresses that gloo would connect to, an id with which NCCL would wait for ever. Its count of restarts does not tell
    them apart either, since nodes count differently. So process 0 chooses a new name, each of the others asks for it
    with a word that only it can know, and what they write from then on is below that name.

    Raises:
        RunError: the others did not come.
    """
    store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
    word = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    others = range(1, world)
    answered: dict[int, bytes] = {}
    name = word if rank == 0 else None
    if name is None:
        store.set(f"asks/{rank}", word)
    while name is None or (rank == 0 and not store.check([f"{name}/{other}" for other in others])):
        if time.monotonic() > deadline:
            raise RunError(
                f"process {rank} of {world} waited {timeout} for the others; see to it that all nodes were started "
                "with the same address, port and number of nodes."
            )
        if rank == 0:
            for other in others:
                if store.check([f"asks/{other}"]) and answered.get(other) != (asked := store.get(f"asks/{other}")):
                    store.set(f"answers/{other}", f"{asked.decode()} {word}")
                    answered[other] = asked
        elif store.check([f"answers/{rank}"]):
            asked_with, _, answer = store.get(f"answers/{rank}").decode().partition(" ")
            if asked_with == word:  # else it was a process's that was here before
                name = answer
                store.set(f"{name}/{rank}", "")
        time.sleep(POLL)
    return dist.distributed_c10d.PrefixStore(name, store), rank, world

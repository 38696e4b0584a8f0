"""How the processes of a run divide it: which strategy, why, and the device mesh that stands for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from decovae.errors import InputError
from decovae.runtime import LONGEST_WAIT, Runtime
from decovae.training.config import RunConfig, Strategy

NAMES = ("replicate", "shard")
"""Axes of a mesh in two dimensions."""


@dataclass(frozen=True)
class Sharding:
    """What the processes of a run divide between them.

    Attributes:
        strategy: ddp, fsdp or hsdp.
        world: processes.
        nodes: they are on.
        shard: processes that hold one copy of the weights between them: 1 for ddp, all for fsdp.
        reason: why this strategy.
    """

    strategy: Strategy
    world: int
    nodes: int
    shard: int
    reason: str

    @property
    def sentence(self) -> str:
        """For example "ddp over 4 processes of 1 node: ….\""""
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{self.strategy} over {self.world} processes of {nodes}: {self.reason}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the mesh: copies × processes that divide one, or the latter alone where there is one copy."""
        # One copy must not be an axis of its own: its gradients would be averaged over 1 process, which NCCL's average
        # is said to get wrong.
        return (self.world,) if self.shard == self.world else (self.world // self.shard, self.shard)


def choose_sharding(config: RunConfig, runtime: Runtime) -> Sharding | None:
    """The strategy of a run, None for a run of one process.

    Raises:
        InputError: for `--parallel.shard` that does not fit the strategy or the processes, or hsdp over nodes of
            different sizes.
    """
    wanted, shard = config.parallel.strategy, config.parallel.shard
    if runtime.world == 1:
        return None
    world, sizes = runtime.world, runtime.node_sizes
    strategy, reason = (wanted, "as asked for") if wanted != "auto" else _automatic(sizes)
    if shard is not None and strategy != "hsdp":
        chosen = f"--parallel.strategy {wanted}" + (f" chose {strategy} here" if wanted == "auto" else "")
        raise InputError(f"--parallel.shard {shard}: is for hsdp, and {chosen}; add --parallel.strategy hsdp.")
    if strategy == "hsdp":
        shard = _checked_shard(shard, world, sizes)
        copies = world // shard
        reason += f"; {shard} processes divide a copy of the weights, and there {_are(copies)}"
    return Sharding(strategy, world, len(sizes), {"ddp": 1, "fsdp": world, "hsdp": shard or 1}[strategy], reason)


def _automatic(sizes: tuple[int, ...]) -> tuple[Strategy, str]:
    if len(sizes) == 1:
        return "ddp", "within a node a whole copy for each process costs the fewest messages"
    if max(sizes) == 1:
        return "ddp", "with one process a node there is nobody to divide a copy with but over the network"
    if len(set(sizes)) > 1:
        return "ddp", f"the nodes have {_listed(sizes)} processes, which cannot divide a copy alike"
    return "hsdp", "weights travel within a node, and over the network each process sends its share of gradients alone"


def _checked_shard(shard: int | None, world: int, sizes: tuple[int, ...]) -> int:
    if shard is None:
        if len(set(sizes)) > 1:
            raise InputError(
                f"--parallel.strategy hsdp: the nodes have {_listed(sizes)} processes; start as many on each, or say "
                "with --parallel.shard how many divide a copy of the weights."
            )
        return sizes[0]
    if shard < 1 or world % shard:
        raise InputError(
            f"--parallel.shard {shard}: does not divide the {world} process{'es' * (world > 1)} of this run; choose a "
            f"divisor, such as the {sizes[0]} of a node."
        )
    if len(set(sizes)) > 1 and any(size % shard for size in sizes):
        raise InputError(
            f"--parallel.shard {shard}: does not divide the processes of each node ({_listed(sizes)}); choose a "
            "divisor of all, or --parallel.strategy fsdp."
        )
    return shard


def _listed(sizes: tuple[int, ...]) -> str:
    return " and ".join(map(str, sizes))


def _are(copies: int) -> str:
    return "is 1 copy" if copies == 1 else f"are {copies} copies"


def mesh_of(sharding: Sharding, runtime: Runtime) -> DeviceMesh:
    """The mesh of a strategy; one for all networks of a run. Every process calls it alike."""
    assert runtime.group is not None
    return _mesh(runtime.group, runtime.device.type, sharding.shape)


@lru_cache(maxsize=1)  # a group for each process and axis holds communicators of its own: networks share them
def _mesh(group: dist.ProcessGroup, device: str, shape: tuple[int, ...]) -> DeviceMesh:
    if len(shape) == 1:
        return DeviceMesh.from_group(group, device)
    ranks = torch.arange(dist.get_world_size(group)).view(shape)
    axes = (group if shape[1] == 1 else _mine(ranks.T.tolist()), _mine(ranks.tolist()))
    return DeviceMesh.from_group(list(axes), device, mesh=ranks, mesh_dim_names=NAMES)


def _mine(rows: list[list[int]]) -> dist.ProcessGroup:
    """The group of this process, of groups that all processes make together.

    `init_device_mesh` would split the group of all processes, which has the wait of its library and not ours.
    """
    mine: dist.ProcessGroup | None = None
    for row in rows:
        group = dist.new_group(row, timeout=LONGEST_WAIT)
        if dist.get_rank() in row:
            mine = cast(dist.ProcessGroup, group)
    assert mine is not None  # the rows hold every process
    return mine

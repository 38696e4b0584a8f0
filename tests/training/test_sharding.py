"""How a strategy is chosen, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from decovae.errors import InputError
from decovae.runtime import Runtime
from decovae.training.config import ParallelConfig, RunConfig, Strategy
from decovae.training.sharding import Sharding, choose_sharding


def chosen(sizes: list[int], strategy: Strategy = "auto", shard: int | None = None) -> Sharding | None:
    places = tuple((node, size) for node, size in enumerate(sizes) for _ in range(size))
    runtime = Runtime(torch.device("cpu"), world=sum(sizes), local_worlds=places)
    return choose_sharding(RunConfig(parallel=ParallelConfig(strategy=strategy, shard=shard)), runtime)


@pytest.mark.parametrize(
    ("sizes", "strategy", "shard", "expected", "shape"),
    [
        ([4], "auto", None, "ddp", (4, 1)),
        ([1, 1], "auto", None, "ddp", (2, 1)),
        ([4, 2], "auto", None, "ddp", (6, 1)),
        ([4, 4], "auto", None, "hsdp", (2, 4)),
        ([4, 4], "auto", 2, "hsdp", (4, 2)),
        ([4, 4], "fsdp", None, "fsdp", (8,)),
        ([4], "hsdp", 2, "hsdp", (2, 2)),
        ([4], "hsdp", None, "hsdp", (4,)),
        ([4, 2], "hsdp", 2, "hsdp", (3, 2)),
    ],
)
def test_the_mesh_fits_the_processes(
    sizes: list[int], strategy: Strategy, shard: int | None, expected: str, shape: tuple[int, ...]
) -> None:
    found = chosen(sizes, strategy, shard)
    assert found is not None
    assert (found.strategy, found.shape) == (expected, shape)
    nodes = "1 node" if len(sizes) == 1 else f"{len(sizes)} nodes"
    assert found.sentence.startswith(f"{expected} over {sum(sizes)} processes of {nodes}: ")


def test_one_process_has_nobody_to_share_with() -> None:
    assert chosen([1]) is None
    assert chosen([1], "fsdp") is None


@pytest.mark.parametrize(
    ("sizes", "strategy", "shard"),
    [
        ([4], "hsdp", 3),
        ([4], "hsdp", 0),
        ([4], "ddp", 2),
        ([4], "auto", 2),
        ([4, 2], "hsdp", None),
        ([4, 2], "hsdp", 3),
    ],
)
def test_what_does_not_fit_is_refused(sizes: list[int], strategy: Strategy, shard: int | None) -> None:
    with pytest.raises(InputError, match="--parallel"):
        chosen(sizes, strategy, shard)

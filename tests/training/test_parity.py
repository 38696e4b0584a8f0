"""However many processes share a run, and whatever they divide, it trains the same networks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from decovae.losses.objective import LossConfig, VAEObjective
from decovae.models.autoencoder import AutoencoderConfig
from decovae.models.discriminators import Discriminators
from decovae.runtime import Runtime
from decovae.training import parallel
from decovae.training.config import AdversarialOptimizerConfig, ParallelConfig, Strategy, VAEConfig
from decovae.training.stage import Batch
from decovae.training.step import Step
from decovae.training.vae import VAENetworks
from tests.ranks import free_port, joined, spawn

STEPS = 10
SAMPLES = 4
"""In a step, of all processes."""

CONFIG = VAEConfig(
    steps=STEPS,
    model=AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2),
    optimizer=AdversarialOptimizerConfig(learning_rate=1e-3, discriminator_learning_rate=2e-4),
    loss=LossConfig(
        perceptual=0.0, slice_fraction=0.05, adversarial_slices=0.1, adversarial_volume=0.1, adversarial_warmup=0
    ),
    precision="fp32",
    compile="off",
)


def batches(world: int, rank: int, accumulation: int) -> Iterator[Batch]:
    """A process's batches: samples that are a function of their position alone."""
    size = SAMPLES // world // accumulation
    for number in range(STEPS * accumulation):
        first = (number * world + rank) * size
        positions = torch.arange(first, first + size)
        images = [torch.rand(1, 16, 16, 24, generator=torch.Generator().manual_seed(at)) for at in positions.tolist()]
        yield {"image": torch.stack(images), "position": positions}


def trained(runtime: Runtime, strategy: Strategy, accumulation: int) -> dict[str, torch.Tensor]:
    """Every network's weights after the last step."""
    config = replace(
        CONFIG,
        optimizer=replace(CONFIG.optimizer, accumulation=accumulation),
        parallel=ParallelConfig(strategy=strategy, shard=2 if strategy == "hsdp" else None),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decovae.models.discriminators.Discriminators", partial(Discriminators, channels=4, layers=2))
        networks = VAENetworks(config, runtime, VAEObjective(config.loss))
    updates = Step(networks, config, runtime)
    source = batches(runtime.world, runtime.rank, accumulation)
    for step in range(STEPS):
        updates.gradients(source, step)
        updates.update(step)
    return {
        f"{name}.{key}": value.full_tensor() if isinstance(value, DTensor) else value.contiguous()
        for name, network in networks.networks.items()
        for key, value in network.state_dict().items()
    }


def train_on_ranks(rank: int, port: int, cases: list[tuple[Strategy, int]], folder: Path) -> None:
    world = os.environ["WORLD_SIZE"]
    parallel.UNIT = 1_000  # so that networks as small as these have several
    with joined(rank, port) as runtime:
        for strategy, accumulation in cases:
            weights = trained(runtime, strategy, accumulation)
            if runtime.main:
                torch.save(weights, folder / f"{world}-{strategy}-{accumulation}.pt")


@pytest.fixture(scope="module")
def alone() -> dict[int, dict[str, torch.Tensor]]:
    """What one process trains, by the batches that it accumulates in a step."""
    return {accumulation: trained(Runtime(torch.device("cpu")), "auto", accumulation) for accumulation in (1, 2)}


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [("ddp", 2), ("fsdp", 1)]),
        pytest.param(2, [("ddp", 1), ("fsdp", 2)], marks=pytest.mark.slow),
        pytest.param(4, [("ddp", 1), ("fsdp", 1), ("hsdp", 1)], marks=pytest.mark.slow),
    ],
)
def test_all_strategies_train_what_one_process_does(
    world: int, cases: list[tuple[Strategy, int]], alone: dict[int, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    spawn(train_on_ranks, (free_port(), cases, tmp_path), world)
    for strategy, accumulation in cases:
        found = torch.load(tmp_path / f"{world}-{strategy}-{accumulation}.pt", weights_only=True)
        expected = alone[accumulation]
        assert found.keys() == expected.keys()
        distance = max((found[key] - expected[key]).abs().max().item() for key in expected)
        assert distance < 1e-5, f"{strategy}, accumulation {accumulation}: {distance}"

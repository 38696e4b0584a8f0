"""What is random in a step is a function of the run's seed and each sample's position: not of how batches are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from decovae.data import streams
from decovae.generation.flow_matching import TimeSchedule
from decovae.losses.objective import LossConfig, VAEObjective
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.runtime import Runtime
from decovae.training.config import DecoderConfig, FlowConfig
from decovae.training.decoder import DecoderNetworks
from decovae.training.flow import FlowStage
from decovae.training.noise import normal_noise, positions_of, uniforms
from decovae.training.presets import QUICKSTART
from decovae.training.stage import Batch, Networks
from decovae.training.vae import VAENetworks
from tests.channel_cases import DEVICE
from tests.generation.flows import AGE_AND_SEX, describe, tiny_autoencoder, tiny_flow

FIRST = 40
MODEL = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)
LOSS = LossConfig(perceptual_network="random", slice_fraction=0.05)
RUNTIME = Runtime(DEVICE)

pytestmark = pytest.mark.device


def cut(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """A batch in parts, as processes and accumulated batches share it."""
    parts = [value.split(list(sizes)) for value in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


def outcome(stage: Networks, batches: Sequence[Batch]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Terms and gradients of a step on these batches, weighted by their sizes."""
    sizes = [len(batch["position"]) for batch in batches]
    terms: dict[str, float] = {}
    for batch, size in zip(batches, sizes, strict=True):
        share = size / sum(sizes)
        for _, loss in stage.losses(batch, 0):
            (share * loss.total).backward()
            for name, value in loss.terms.items():
                terms[name] = terms.get(name, 0.0) + share * value.item()
    parameters = [p for network in stage.networks.values() for p in network.parameters()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return terms, gradients


def vae() -> tuple[Networks, Batch]:
    config = replace(QUICKSTART, model=MODEL, loss=LOSS, deco="none", seed=3)
    return VAENetworks(config, RUNTIME, VAEObjective(LOSS, deco="none")), images()


def decoder() -> tuple[Networks, Batch]:
    loss = replace(LOSS, kl=0.0)
    config = DecoderConfig(vae=Path("vae"), noise_scale=1.0, loss=loss, seed=3)
    return DecoderNetworks(config, RUNTIME, VAEObjective(loss, deco="none"), Autoencoder(MODEL)), images()


def flow() -> tuple[Networks, Batch]:
    stage = object.__new__(FlowStage)  # no latents on disk are needed
    stage.config = FlowConfig(train_on="draws", condition_dropout=0.5, seed=3)
    stage.runtime, stage.schedule, stage.voxels = RUNTIME, TimeSchedule(), 8 * 10 * 8
    stage.space, stage.conditions = describe(tiny_autoencoder()).space, AGE_AND_SEX
    stage.networks = {"flow": RUNTIME.place(tiny_flow(AGE_AND_SEX))}
    stage.network = stage.networks["flow"]
    mean, sigma = torch.rand(2, 4, 4, 8, 10, 8)
    condition = torch.tensor([[0.3, 0.0], [-1.0, 1.0], [2.0, 1.0], [0.1, 0.0]])
    return stage, {"mean": mean, "sigma": sigma, "condition": condition, "position": positions()}


def images() -> Batch:
    return {"image": torch.rand(4, 1, 24, 24, 24), "position": positions()}


def positions() -> torch.Tensor:
    return torch.arange(FIRST, FIRST + 4)


@pytest.mark.parametrize("make", [vae, decoder, flow])
def test_a_step_does_not_depend_on_how_its_samples_are_divided(make: Any) -> None:
    torch.manual_seed(0)
    stage, batch = make()
    terms, gradients = outcome(stage, [batch])
    assert gradients
    for sizes in ((1, 1, 1, 1), (1, 3)):
        torch.manual_seed(len(sizes))  # which nothing draws from
        divided_terms, divided = outcome(stage, cut(batch, sizes))
        assert divided_terms == pytest.approx(terms, rel=1e-4, abs=1e-6)
        for one, other in zip(divided, gradients, strict=True):
            assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6
    elsewhere, _ = outcome(stage, [{**batch, "position": positions() + 4}])
    assert elsewhere != pytest.approx(terms, rel=1e-4), "other positions have other noise"


def test_noise_of_a_batch_in_parts_is_the_whole_s() -> None:
    like = torch.empty(5, 4, 3, 6, 5, device=DEVICE)
    whole = normal_noise(like, seed=1, stream=streams.NOISE, first=FIRST)
    assert whole.std().item() == pytest.approx(1, abs=0.1)
    sizes = (1, 3, 1)
    starts = [FIRST, FIRST + 1, FIRST + 4]
    parts = [
        normal_noise(part, seed=1, stream=streams.NOISE, first=start)
        for part, start in zip(like.split(sizes), starts, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    last = like.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(
        normal_noise(last, seed=1, stream=streams.NOISE, first=FIRST), whole, rtol=1e-6, atol=1e-6
    )


def test_streams_seeds_and_positions_are_apart() -> None:
    keys = [(seed, stream) for seed in (0, 1) for stream in (streams.POSTERIOR, streams.LATENT, streams.NOISE)]
    like = torch.empty(2, 4, 10, 10, 10, device=DEVICE)
    drawn = [part.flatten() for key in keys for part in normal_noise(like, seed=key[0], stream=key[1], first=FIRST)]
    for one, other in combinations(drawn, 2):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.08  # five standard deviations
    seeds = {streams.stream_seed(seed, stream) for seed in range(50) for stream in range(9)}
    assert len(seeds) == 50 * 9
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uniform_numbers_are_a_position_s_own() -> None:
    device = torch.device("cpu")
    whole = uniforms(3, seed=1, stream=streams.TIME, positions=range(FIRST, FIRST + 1000), device=device)
    assert whole.shape == (1000, 3)
    assert whole.dtype == torch.float64
    assert whole.mean().item() == pytest.approx(0.5, abs=0.03)
    part = uniforms(3, seed=1, stream=streams.TIME, positions=[FIRST + 7, FIRST + 2], device=device)
    assert torch.equal(part, whole[[7, 2]])
    other = uniforms(3, seed=1, stream=streams.DROPOUT, positions=[FIRST + 7, FIRST + 2], device=device)
    assert not torch.equal(other, part)


def test_a_batch_that_names_no_positions_counts_from_zero() -> None:
    assert positions_of({"image": torch.zeros(3)}, 3) == [0, 1, 2]
    assert positions_of({"position": torch.tensor([5, 6])}, 2) == [5, 6]

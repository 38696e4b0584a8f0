"""One read of the latents gives the moments of all their voxels, and codes that are voxels of theirs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from decovae.errors import InputError
from decovae.evaluation.channels import analyze_store, embed, places_of, read_channels
from decovae.generation.latents import LatentStore
from decovae.losses.moments import channel_moments
from decovae.metrics.latents import analyze_latents
from decovae.runtime import Runtime
from tests.evaluation.conftest import on_processes
from tests.generation.cohort import encode

ALONE = Runtime(torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    """35 latents of 4×4×6×4."""
    return encode(tmp_path_factory.mktemp("latents") / "store")


def everything(store: LatentStore, places: list[int]) -> torch.Tensor:
    """μ of several latents, (n, C, d, h, w), float64."""
    return torch.stack([store.read(place)[0] for place in places]).double()


@pytest.mark.parametrize("split", ["training", "validation", "all"])
def test_moments_are_those_of_all_voxels_at_once(store: LatentStore, split: str) -> None:
    places = places_of(store, split)
    whole = channel_moments(everything(store, places))
    found = read_channels(store, places, ALONE).moments
    assert found.count == whole.count == len(places) * math.prod(store.space.shape)
    torch.testing.assert_close(found.packed, whole.packed, rtol=1e-12, atol=1e-12)


def test_the_training_split_agrees_with_the_index(store: LatentStore) -> None:
    assert torch.equal(read_channels(store, store.training, ALONE).moments.packed, store.moments.packed)


def test_codes_are_different_voxels_of_the_latents(store: LatentStore) -> None:
    places = places_of(store, "all")
    codes = read_channels(store, places, ALONE, codes=50, seed=3).codes
    assert codes.shape == (50, 4)
    voxels = everything(store, places).float().movedim(1, -1).flatten(0, -2)
    found = [int(torch.nonzero((voxels == code).all(1))[0]) for code in codes]
    assert len(set(found)) == 50
    assert found == sorted(found)


def test_codes_are_drawn_from_all_latents_alike(store: LatentStore) -> None:
    places = places_of(store, "all")
    voxels = math.prod(store.space.shape)
    codes = read_channels(store, places, ALONE, codes=1400, seed=0).codes
    owners = everything(store, places).float().movedim(1, -1).flatten(0, -2)
    found = torch.tensor([int(torch.nonzero((owners == code).all(1))[0]) // voxels for code in codes])
    counts = torch.bincount(found, minlength=len(places)).double()
    expected = 1400 / len(places)
    deviation = math.sqrt(expected * (1 - 1400 / (voxels * len(places))))  # hypergeometric, nearly
    assert float((counts - expected).abs().max()) < 5 * deviation


def test_codes_depend_on_the_seed_alone(store: LatentStore) -> None:
    first, again, other = (read_channels(store, [1, 2, 5], ALONE, codes=20, seed=seed).codes for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fewer_voxels_than_codes_are_all_taken(store: LatentStore) -> None:
    codes = read_channels(store, [0], ALONE, codes=10_000).codes
    torch.testing.assert_close(codes, store.read(0)[0].flatten(1).T, rtol=0, atol=0)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_same_bits(store: LatentStore, world: int) -> None:
    places = places_of(store, "all")
    alone = read_channels(store, places, ALONE, codes=40, seed=1)
    for found in on_processes(world, lambda runtime: read_channels(store, places, runtime, codes=40, seed=1)):
        assert torch.equal(found.moments.packed, alone.moments.packed)
        assert torch.equal(found.codes, alone.codes)


def test_an_error_of_one_process_reaches_all(store: LatentStore) -> None:
    class Damaged:
        space = store.space

        def read(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
            if place == 1:
                raise InputError("latent 1 is damaged")
            return store.read(place)

    for error in on_processes(2, lambda runtime: read_channels(Damaged(), [0, 1, 2], runtime)):  # type: ignore[arg-type]
        assert isinstance(error, InputError)
        assert error.on_all_processes


def test_an_analysis_holds_table_1(store: LatentStore) -> None:
    found = analyze_store(store, ALONE, run="r", stage="vae", deco="sid", codes=30)
    latents = everything(store, places_of(store, "all"))
    expected = analyze_latents(latents)
    assert found.cosine_similarity == pytest.approx(expected.cosine_similarity, rel=1e-9)
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-9)
    flat = latents.movedim(1, 0).flatten(1).numpy()
    np.testing.assert_allclose(found.channel_mean, flat.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found.channel_variance, flat.var(1, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(found.correlation_matrix, np.corrcoef(flat), atol=2e-6)
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(found.cosine_matrix, np.abs(flat @ flat.T) / np.outer(norms, norms), atol=2e-6)
    assert (found.latents, found.codes, found.data) == (35, flat.shape[1], "noise")
    assert found.tsne is not None
    assert len(found.tsne.points) == 30
    assert "30 voxels' codes" in found.tsne.what


def test_clusters_stay_apart_in_an_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.cat([torch.randn(60, 4, generator=generator) + 40 * side for side in (0, 1)])
    found = embed(codes, seed=0)
    assert found is not None
    points = torch.tensor(found.points)
    distances = torch.cdist(points, points)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.argmin(1)
    assert ((nearest < 60) == (torch.arange(120) < 60)).all()


def test_few_codes_are_embedded_with_less_perplexity_or_not_at_all() -> None:
    assert embed(torch.randn(4, 4), seed=0) is None
    found = embed(torch.randn(10, 1), seed=0)
    assert found is not None
    assert found.perplexity == 3
    assert len(found.points) == 10


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    store = encode(tmp_path / "store", training=[0, 1, 2], validation=[])
    with pytest.raises(InputError, match=r"--split validation: .* holds no such latents"):
        places_of(store, "validation")

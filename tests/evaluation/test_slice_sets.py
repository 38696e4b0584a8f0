"""Statistics of a set are those of all its slices together, whoever gathered them, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from decovae.evaluation.slice_sets import GROUPS, SliceSet, SliceStatistics, dealt, even_places, middle_half
from decovae.evaluation.slices import Slicing
from decovae.metrics.frechet import feature_moments
from decovae.metrics.slice_features import PLANES, NetworkKind, SliceNetwork
from decovae.runtime import Runtime
from tests.evaluation.conftest import on_processes

GRID = (8, 12, 10)
ALONE = Runtime(torch.device("cpu"))
SLICING = Slicing(
    [SliceNetwork(NetworkKind("few", "a few numbers", proxy=True, features=3), nn.Identity(), lambda x: x)]
)


def features(place: int) -> dict[str, dict[str, Tensor]]:
    """Of one volume, the same wherever they are asked for."""
    generator = torch.Generator().manual_seed(place)
    sizes = SLICING.per_volume(GRID)
    return {"few": {plane: torch.randn(sizes[plane], 3, generator=generator) + place for plane in PLANES}}


def gathered(count: int, runtime: Runtime, *, subset: int = 0) -> SliceSet:
    statistics = SliceStatistics(SLICING, GRID, count, runtime, subset=subset)
    for place in dealt(count, runtime):
        statistics.add(place, features(place))
    return statistics.collect()


@pytest.mark.parametrize("count", [1, 2, GROUPS, GROUPS + 1, 53])
def test_moments_are_those_of_all_slices_at_once(count: int) -> None:
    found = gathered(count, ALONE).moments
    for plane in PLANES:
        whole = feature_moments(torch.cat([features(place)["few"][plane] for place in range(count)]))
        assert found["few", plane].count == whole.count
        torch.testing.assert_close(found["few", plane].mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["few", plane].scatter, whole.scatter, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("world", [2, 3, 20])
@pytest.mark.parametrize("count", [2, 37])
def test_processes_give_the_same_bits(world: int, count: int) -> None:
    alone = gathered(count, ALONE, subset=11)
    for found in on_processes(world, lambda runtime: gathered(count, runtime, subset=11)):
        for key, moments in alone.moments.items():
            assert torch.equal(found.moments[key].mean, moments.mean)
            assert torch.equal(found.moments[key].scatter, moments.scatter)
            assert torch.equal(found.subset[key], alone.subset[key])


@pytest.mark.parametrize("world", [1, 2, 5, 30])
@pytest.mark.parametrize("count", [0, 1, 16, 40])
def test_every_volume_is_dealt_once(world: int, count: int) -> None:
    found = [dealt(count, Runtime(torch.device("cpu"), rank, rank, world)) for rank in range(world)]
    assert sorted(place for places in found for place in places) == list(range(count))


def test_alone_a_process_holds_few_sets_of_moments() -> None:
    statistics = SliceStatistics(SLICING, GRID, 64, ALONE, subset=0)
    for place in dealt(64, ALONE):
        statistics.add(place, features(place))
        assert len(statistics._groups) <= 2


@pytest.mark.parametrize(("count", "subset"), [(3, 2000), (40, 7), (5, 0)])
def test_a_subset_is_spread_over_the_middle_of_the_volumes(count: int, subset: int) -> None:
    found = gathered(count, ALONE, subset=subset).subset
    for plane in PLANES:
        sizes = SLICING.per_volume(GRID)
        middle = torch.cat([features(place)["few"][plane][list(middle_half(sizes[plane]))] for place in range(count)])
        expected = middle[even_places(len(middle), subset)]
        assert torch.equal(found["few", plane], expected)
        assert len(expected) == min(subset, len(middle))


@pytest.mark.parametrize(("total", "most"), [(10, 3), (3, 10), (7, 7), (2001, 2000), (5, 0), (0, 5)])
def test_even_places_are_different_and_evenly_apart(total: int, most: int) -> None:
    found = even_places(total, most)
    assert len(found) == min(total, most)
    if len(found) > 1:
        gaps = found.diff()
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1
        assert 0 <= found[0] <= found[-1] < total

"""Copies of training volumes are found, also those that a decoder blurred, and new subjects are not taken for such."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from decovae.data.cohort import cohort_subject
from decovae.metrics import memorisation as module
from decovae.metrics.memorisation import THUMBNAIL_VOXELS, memorisation, nearest_training, thumbnail

SHAPE = (24, 28, 24)


@pytest.fixture(scope="module")
def brains() -> list[Tensor]:
    """Fifteen subjects of the template cohort, scaled to [0, 1]."""
    subjects = [cohort_subject(index, seed=3, shape=SHAPE) for index in range(15)]
    return [torch.from_numpy(subject / np.quantile(subject, 0.995)).clamp(0, 1) for subject in subjects]


def thumbnails(volumes: list[Tensor]) -> Tensor:
    return torch.stack([thumbnail(volume) for volume in volumes])


def blurred(volume: Tensor) -> Tensor:
    """As decoders blur, with a little noise and another gain."""
    noise = 0.02 * torch.randn(volume.shape, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool3d(volume[None], 3, stride=1, padding=1)[0]
    return (0.97 * smooth + noise).clamp(0, 1)


def test_copies_are_found_and_new_subjects_are_not(brains: list[Tensor]) -> None:
    train, held_out, fresh = brains[:8], brains[8:11], brains[11:]
    samples = [fresh[0], train[7], *fresh[1:3], blurred(train[2]), fresh[3]]
    found = memorisation(thumbnails(train), thumbnails(held_out), thumbnails(samples))
    assert found.suspicious == [1, 4]
    assert found.nearest[1] == 7
    assert found.nearest[4] == 2
    assert found.samples[1] == 0
    assert all(found.samples[place] < found.threshold for place in found.suspicious)

    new = memorisation(thumbnails(train), thumbnails(held_out), thumbnails(fresh))
    assert new.suspicious == []
    assert new.ratio == pytest.approx(1, abs=0.2)
    copies = memorisation(thumbnails(train), thumbnails(held_out), thumbnails(train))
    assert copies.suspicious == list(range(8))
    assert copies.ratio == 0


def test_distances_are_root_mean_square_differences() -> None:
    train, held_out, samples = torch.zeros(1, 16), torch.full((1, 16), 0.2), torch.full((2, 16), 0.1)
    found = memorisation(train, held_out, samples)
    assert found.held_out == pytest.approx([0.2])
    assert found.samples == pytest.approx([0.1, 0.1])
    assert found.ratio == pytest.approx(0.5)
    assert memorisation(train, train, samples).ratio is None


@pytest.mark.parametrize("rows", [3, 1024])
def test_nearest_training_volume_is_the_nearest(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.rand(17, 5, generator=generator) + 10, torch.rand(11, 5, generator=generator) + 10
    queries[4] = train[13]
    distance, place = nearest_training(train, queries)
    every = torch.stack([(train.double() - query.double()).norm(dim=1) for query in queries])
    torch.testing.assert_close(distance, every.min(1).values, rtol=1e-12, atol=0)
    assert torch.equal(place, every.argmin(1))
    assert distance[4] == 0


@pytest.mark.parametrize("shape", [(128, 256, 128), (33, 20, 41), (10, 11, 12), (1, 1, 9000)])
def test_a_thumbnail_is_small_and_keeps_the_mean(shape: tuple[int, int, int]) -> None:
    volume = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    small = thumbnail(volume)
    assert small.ndim == 1
    assert small.dtype == torch.float32
    assert min(volume.numel(), THUMBNAIL_VOXELS) / 2 < len(small) <= THUMBNAIL_VOXELS
    assert float(small.mean()) == pytest.approx(float(volume.mean()), abs=0.01)
    assert torch.equal(thumbnail(volume[None]), small)
    if volume.numel() <= THUMBNAIL_VOXELS:
        torch.testing.assert_close(small, volume.flatten())


def test_wrong_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="int64"):
        thumbnail(torch.zeros(2, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 3\)"):
        thumbnail(torch.zeros(2, 3, 3, 3))
    for train, queries in ((torch.zeros(0, 3), torch.zeros(2, 3)), (torch.zeros(2, 3), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match=r"\(N, F\) and \(M, F\)"):
            nearest_training(train, queries)
    with pytest.raises(ValueError, match="finite"):
        nearest_training(torch.zeros(2, 3), torch.full((1, 3), torch.nan))
    with pytest.raises(TypeError, match="int64"):
        nearest_training(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))

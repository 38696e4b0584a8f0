"""Batches are the same samples whoever makes them, in whatever company, and wherever they are finished."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decovae.data.augmentation import Augmentation, AugmentationConfig
from decovae.data.loading import Batch, Collate, Finish, InView, Loader, patch_loader
from decovae.data.outbox import Outbox
from decovae.data.patches import Crop, PatchDataset, visited
from decovae.data.store import open_store
from decovae.data.volumes import Volumes
from decovae.errors import InputError
from decovae.process import lost_loader
from decovae.training.command_line import exit_code
from tests.data.stores import GRID, write_store
from tests.data.test_patches import Noise

CPU = torch.device("cpu")
SHAPE, PATCH = (32, 36, 32), (16, 16, 12)
ORDER = [[0, 1], [6, 7], [2, 3], [4, 5]]


class Integers(Noise):
    """Volumes in 16 bits: integers, every third in floating point, and the intensities scaled by them."""

    def __init__(self, count: int) -> None:
        super().__init__(count, SHAPE)
        self.stored = [self._in_16_bits(index, array) for index, array in enumerate(self.arrays)]
        self.records = [
            replace(record, low=low, high=high)
            for record, (_, low, high) in zip(self.records, self.stored, strict=True)
        ]

    def _in_16_bits(self, index: int, array: np.ndarray) -> tuple[np.ndarray, float, float]:
        if index % 3 == 2:
            return array.astype(np.float16), 0.0, 1.0
        return np.round(array * 32768 - 8192 * index).astype(np.int16), -8192.0 * index, 32768.0 - 8192 * index

    def read(self, index: int) -> np.ndarray:
        return self.stored[index][0]


def dataset(volumes: Volumes) -> PatchDataset:
    return PatchDataset(volumes, range(len(volumes.records)), grid=SHAPE, patch=PATCH, seed=3, foreground=0.5)


def loaded(volumes: Volumes, order: list[list[int]], *, augment: bool, **options: Any) -> list[Batch]:
    augmentation = Augmentation(AugmentationConfig(), PATCH) if augment else None
    settings = {"workers": 0, "prefetch": 2, "device": CPU, **options}
    return list(patch_loader(dataset(volumes), order, augmentation=augmentation, **settings))


def by_position(batches: list[Batch]) -> dict[int, tuple[str, torch.Tensor]]:
    rows = [zip(b["position"].tolist(), b["subject"], b["image"], strict=True) for b in batches]
    return {position: (subject, image) for position, subject, image in chain.from_iterable(rows)}


def alike(one: list[Batch], other: list[Batch]) -> bool:
    mine, theirs = by_position(one), by_position(other)
    return mine.keys() == theirs.keys() and all(
        mine[place][0] == theirs[place][0] and torch.equal(mine[place][1], theirs[place][1]) for place in mine
    )


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_neither_workers_nor_company_change_a_sample(augment: bool) -> None:
    volumes = Integers(3)
    expected = loaded(volumes, ORDER, augment=augment)
    for batch, positions in zip(expected, ORDER, strict=True):
        assert batch["position"].tolist() == positions
        assert batch["image"].shape == (2, 1, *PATCH)
        assert batch["image"].dtype == torch.float32
        assert batch.keys() == {"image", "subject", "position"}
    assert alike(expected, loaded(volumes, ORDER, augment=augment, workers=2, prefetch=1))
    assert alike(expected, loaded(volumes, [list(range(8))], augment=augment))
    assert alike(expected, loaded(volumes, [[place] for place in range(8)], augment=augment))


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_finished_after_the_workers_is_what_they_finish(augment: bool, workers: int) -> None:
    """As on a GPU, except for the device."""
    volumes = Integers(3)
    finish = Finish(Augmentation(AugmentationConfig(), PATCH) if augment else None, seed=3, device=CPU)

    def later(batch: Batch) -> Batch:
        return finish({**batch, "image": batch["image"].clone()})

    collate = Collate(None, Outbox(4))
    found = Loader(dataset(volumes), ORDER, workers=workers, prefetch=3, device=CPU, collate=collate, finish=later)
    assert alike(list(found), loaded(volumes, ORDER, augment=augment))


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 1), (2, 4)])
def test_a_batch_stays_what_it_is_while_others_are_made(augment: bool, workers: int, prefetch: int) -> None:
    volumes = Integers(3)
    order = [list(range(first, first + 2 + first % 3)) for first in range(0, 80, 4)]  # of several sizes
    augmentation = Augmentation(AugmentationConfig(), PATCH) if augment else None
    batches = patch_loader(
        dataset(volumes), order, augmentation=augmentation, workers=workers, prefetch=prefetch, device=CPU
    )
    kept, copies = [], []
    for batch in batches:
        time.sleep(0.002)  # lets workers get as far ahead as they may
        kept.append(batch)
        copies.append({**batch, "image": batch["image"].clone()})
    assert alike(kept, copies)
    assert alike(kept, loaded(volumes, order, augment=augment))


def test_a_loader_may_be_gone_through_twice_at_once() -> None:
    loader = patch_loader(dataset(Integers(3)), ORDER, augmentation=None, workers=1, prefetch=1, device=CPU)
    first, second = zip(*zip(loader, loader, strict=True), strict=True)
    expected = loaded(Integers(3), ORDER, augment=False)
    assert alike(list(first), expected)
    assert alike(list(second), expected)


def test_voxels_travel_in_the_bits_that_they_are_stored_in() -> None:
    samples, collate = dataset(Integers(3)), Collate(None, Outbox(1))
    kinds: dict[str, list[Crop]] = {}
    for position in range(12):
        crop = samples[position]
        kinds.setdefault(crop.voxels.dtype.name, []).append(crop)
    for name, crops in kinds.items():
        batch = collate(crops)
        assert batch["image"].dtype == getattr(torch, name)
        assert np.array_equal(batch["image"][1, 0].numpy(), crops[1].voxels)
    mixed = collate([kinds["int16"][0], kinds["float16"][0]])
    assert mixed["image"].dtype == torch.float32
    assert np.array_equal(mixed["image"][0, 0].numpy(), kinds["int16"][0].voxels)


def test_intensities_are_scaled_by_their_own_volume_s_range() -> None:
    crops = [Crop(np.full(PATCH, 5 + i, np.int16), low=4.0, high=6.0 + i, subject="s", position=i) for i in range(2)]
    image = Finish(None, seed=0, device=CPU)(Collate(None, Outbox(1))(crops))["image"]
    assert torch.equal(image, torch.tensor([1 / 2, 2 / 3]).view(2, 1, 1, 1, 1).expand(2, 1, *PATCH))


def test_batches_repeat_from_any_position() -> None:
    volumes = Integers(3)
    whole = loaded(volumes, ORDER, augment=True)
    assert alike(whole[2:], loaded(volumes, ORDER[2:], augment=True, workers=1))


class Gone(Noise):
    def read(self, index: int) -> np.ndarray:
        raise InputError("The volume s0 is gone.")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_volume_that_is_gone_is_an_input_error(workers: int) -> None:
    with pytest.raises(InputError, match="The volume s0 is gone"):
        loaded(Gone(2, SHAPE), ORDER, augment=False, workers=workers)


class Killed(Integers):
    """Kills its reader after a while."""

    def read(self, index: int) -> np.ndarray:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_a_worker_that_is_killed_is_one_known_error() -> None:
    with pytest.raises(RuntimeError) as caught:
        loaded(Killed(3), ORDER, augment=False, workers=1)
    assert lost_loader(caught.value)
    assert exit_code(lambda: _raise(caught.value), stopped="") == 1


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.gpu
@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_finishes_the_same_batches_without_waiting(augment: bool, workers: int) -> None:
    device, volumes = torch.device("cuda"), Integers(3)
    expected = by_position(loaded(volumes, ORDER, augment=augment))
    loaded(volumes, ORDER, augment=augment, device=device)  # plans, pinned memory and modules are there from here on
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = loaded(volumes, ORDER, augment=augment, device=device, workers=workers)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(batch["image"].device.type == "cuda" and batch["position"].device.type == "cpu" for batch in found)
    for position, (subject, image) in by_position(found).items():
        assert expected[position][0] == subject
        torch.testing.assert_close(image.cpu(), expected[position][1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_each_batch_knows_the_next_of_its_worker(workers: int, count: int) -> None:
    batches = [[10 * batch, 10 * batch + 1] for batch in range(count)]
    seen = list(InView(batches, workers))
    assert seen == batches
    assert [list(positions.following) for positions in seen] == [*batches[workers:], *[[]] * min(workers, count)]


def test_what_follows_changes_no_batch_and_a_damaged_volume_is_named_when_it_is_its_turn(tmp_path: Path) -> None:
    volumes = open_store(write_store(tmp_path / "store", 5))
    dataset = PatchDataset(volumes, range(5), grid=GRID, patch=(3, 4, 2), seed=0)
    alone = PatchDataset(volumes, range(5), grid=GRID, patch=(3, 4, 2), seed=0)
    last = volumes.file(int(dataset.indices[visited(4, 5, seed=0)]))
    last.write_bytes(last.read_bytes()[:-1])
    order = list(InView([[0, 1], [2, 3], [4]], 1))
    for positions in order[:2]:
        crops = dataset.__getitems__(positions)
        assert [crop.position for crop in crops] == positions
        assert all(np.array_equal(crop.voxels, alone[crop.position].voxels) for crop in crops)
    with pytest.raises(InputError, match=last.name):
        dataset.__getitems__(order[2])

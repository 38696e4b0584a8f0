"""The ways from a cohort on disk to batches of random patches that `bench.data` compares, and how each is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import data_peers
from bench.data_tables import (
    FOLDER,
    FOLDER_BARE,
    PERSISTENT,
    PERSISTENT_BARE,
    PERSISTENT_CROP,
    REFERENCE,
    STORE,
    STORE_BARE,
    STORE_RAW,
)
from decovae.data.augmentation import Augmentation, AugmentationConfig
from decovae.data.loading import Batch, Collate, Loader, patch_loader
from decovae.data.nifti import open_nifti
from decovae.data.outbox import Outbox
from decovae.data.patches import PatchDataset
from decovae.data.store import VOLUMES, open_store
from decovae.data.volumes import Shape, Volumes
from decovae.training.sampling import Batches

SEED = 0

PREFETCH = 2
"""Batches that a worker is ahead, as torch and MONAI have it."""


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        subjects: volumes.
        shape: of their files.
        grid: that they are resized to.
        patch: of the crops.
        batch: crops in a batch.
        workers: of a loader.
        rounds: through all ways.
        seconds: that batches are counted for in a round, where all volumes once do not take longer.
        entries: numbers of volumes between which a worker's memory is compared.
    """

    subjects: int
    shape: Shape
    grid: Shape
    patch: Shape
    batch: int
    workers: int
    rounds: int
    seconds: float
    entries: tuple[int, int]

    @property
    def start(self) -> int:
        """Batches of a loader that are not counted."""
        return self.workers * (PREFETCH + 1)


@dataclass(frozen=True)
class Places:
    """Where everything lies: `files` as NIfTI in the folder `nifti`, `store`, and `cache` of PersistentDataset."""

    nifti: Path
    files: Sequence[Path]
    store: Path
    cache: Path


@dataclass(frozen=True)
class Way:
    """One of them.

    Attributes:
        name: in tables.
        batches: from a loader of its own, so many, of which all volumes once come before any twice.
        reads: the files, or folders of files, that patches come from.
    """

    name: str
    batches: Callable[[int], Iterable[Any]]
    reads: Sequence[Path]


def ways(places: Places, size: Size) -> list[Way]:
    """All of them, in a table's order."""
    config = AugmentationConfig()
    random = data_peers.augmentation(config)
    crop = data_peers.cropping(size.patch)
    fixed = data_peers.loading(size.grid) + data_peers.scaling()
    ours = Augmentation(config, size.patch)
    store, folder = open_store(places.store), open_nifti(places.nifti, patch=size.patch)
    return [
        _monai(REFERENCE, places.files, [*fixed, *random, *crop], None, size),
        _monai(PERSISTENT, places.files, [*fixed, *random, *crop], places.cache, size),
        _monai(PERSISTENT_CROP, places.files, [*fixed, *crop, *random], places.cache, size),
        _monai(PERSISTENT_BARE, places.files, [*fixed, *crop], places.cache, size),
        _ours(FOLDER, folder, ours, places.nifti, size),
        _ours(FOLDER_BARE, folder, None, places.nifti, size),
        _ours(STORE, store, ours, places.store / VOLUMES, size),
        _ours(STORE_BARE, store, None, places.store / VOLUMES, size),
        _unfinished(STORE_RAW, store, places.store / VOLUMES, size),
    ]


def _monai(name: str, files: Sequence[Path], transforms: Sequence[Any], cache: Path | None, size: Size) -> Way:
    dataset = data_peers.monai_dataset(files, transforms, cache)

    def batches(count: int) -> Iterable[Any]:
        generator = np.random.default_rng(SEED)
        epochs = -(-count * size.batch // len(files))
        order = list(chain.from_iterable(generator.permutation(len(files)).tolist() for _ in range(min(epochs, 1000))))
        return data_peers.monai_batches(dataset, order[: count * size.batch], size=size.batch, workers=size.workers)

    return Way(name, batches, files if cache is None else [cache])


def _ours(name: str, volumes: Volumes, augmentation: Augmentation | None, reads: Path, size: Size) -> Way:
    dataset = PatchDataset(volumes, range(len(volumes.records)), grid=size.grid, patch=size.patch, seed=SEED)

    def batches(count: int) -> Iterable[Any]:
        return patch_loader(
            dataset,
            Batches(0, count=count, size=size.batch, rank=0, world=1),
            augmentation=augmentation,
            workers=size.workers,
            prefetch=PREFETCH,
            device=torch.device("cpu"),
        )

    return Way(name, batches, [reads])


def _unfinished(name: str, volumes: Volumes, reads: Path, size: Size) -> Way:
    """What workers do where the run has a GPU, which scales and augments; nothing is pinned or sent there."""
    dataset = PatchDataset(volumes, range(len(volumes.records)), grid=size.grid, patch=size.patch, seed=SEED)

    def batches(count: int) -> Iterable[Any]:
        order = Batches(0, count=count, size=size.batch, rank=0, world=1)
        return Loader(
            dataset,
            order,
            workers=size.workers,
            prefetch=PREFETCH,
            device=torch.device("cpu"),
            collate=Collate(None, Outbox(PREFETCH + 1)),
            finish=_copied,
        )

    return Way(name, batches, [reads])


def _copied(batch: Batch) -> Batch:
    """What a thread does that pins memory."""
    return {**batch, "image": batch["image"].clone()}

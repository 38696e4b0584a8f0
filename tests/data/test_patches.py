"""A sample is a function of the seed and its position, whatever the volumes are stored in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from decovae.data.augmentation import AugmentationConfig
from decovae.data.cohort import cohort_affine, cohort_subject, open_cohort
from decovae.data.nifti import open_nifti
from decovae.data.patches import PatchDataset, load_volume, split_subjects
from decovae.data.volumes import VolumeRecord, Volumes, affine_rows
from decovae.errors import InputError
from tests.data.files import ORIENTATIONS, write

SHAPE = (32, 36, 32)
PATCH = (16, 16, 16)
UNIT = affine_rows(np.eye(4))


class Noise:
    """Volumes in memory."""

    def __init__(self, count: int, shape: tuple[int, int, int] = (10, 12, 8)) -> None:
        self.arrays = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
        self.records = [VolumeRecord(f"s{i}", f"memory:{i}", shape, 0.0, 1.0, UNIT) for i in range(count)]

    def read(self, index: int) -> np.ndarray:
        return self.arrays[index]


def dataset(volumes: Volumes, *, seed: int = 0, augmentation: AugmentationConfig | None = None) -> PatchDataset:
    grid = volumes.records[0].shape
    patch = PATCH if grid == SHAPE else (6, 6, 6)
    indices = range(len(volumes.records))
    return PatchDataset(volumes, indices, grid=grid, patch=patch, seed=seed, augmentation=augmentation)


def test_a_sample_is_a_function_of_seed_and_position() -> None:
    volumes = Noise(4)
    first, second = dataset(volumes), dataset(volumes)
    positions = [7, 0, 100_000, 7]
    samples = [first[position] for position in positions]
    for position, sample in zip(positions[::-1], samples[::-1], strict=True):
        assert sample["image"].shape == (1, 6, 6, 6)
        assert sample["image"].dtype == torch.float32
        assert torch.equal(second[position]["image"], sample["image"])
        assert sample["position"] == position
    assert not torch.equal(samples[0]["image"], samples[1]["image"])
    assert not torch.equal(dataset(volumes, seed=1)[7]["image"], samples[0]["image"])


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_visits_every_volume_once(epoch: int) -> None:
    samples = dataset(Noise(9))
    subjects = [samples[epoch * 9 + place]["subject"] for place in range(9)]
    assert sorted(subjects) == [f"s{i}" for i in range(9)]
    assert subjects != [samples[(epoch + 1) * 9 + place]["subject"] for place in range(9)]


def test_only_the_given_indices_are_drawn() -> None:
    volumes = Noise(5)
    samples = PatchDataset(volumes, [1, 4], grid=(10, 12, 8), patch=(6, 6, 6), seed=0)
    assert {samples[position]["subject"] for position in range(20)} == {"s1", "s4"}


def test_crops_reach_every_corner() -> None:
    volumes = Noise(1, (8, 7, 6))
    volumes.arrays[0] = np.arange(8 * 7 * 6).reshape(8, 7, 6)
    samples = PatchDataset(volumes, [0], grid=(8, 7, 6), patch=(6, 6, 6), seed=0)
    corners = Counter(int(samples[position]["image"][0, 0, 0, 0]) for position in range(300))
    assert set(corners) == {(depth * 7 + height) * 6 for depth in range(3) for height in range(2)}
    assert min(corners.values()) > 25


def test_a_patch_is_a_crop_of_the_whole_resized_volume() -> None:
    volumes = Noise(1)
    grid = (14, 9, 13)
    samples = PatchDataset(volumes, [0], grid=grid, patch=(6, 9, 7), seed=0)
    windows = load_volume(volumes, 0, grid)[0].unfold(0, 6, 1).unfold(1, 9, 1).unfold(2, 7, 1)
    for position in range(5):
        distance = (windows - samples[position]["image"][0]).abs().amax((-3, -2, -1))
        assert distance.min() < 1e-5


@pytest.mark.parametrize("augmentation", [None, AugmentationConfig()], ids=["plain", "augmented"])
def test_workers_do_not_change_the_samples(augmentation: AugmentationConfig | None) -> None:
    volumes = open_cohort(3, seed=0, shape=SHAPE)
    samples = dataset(volumes, augmentation=augmentation)
    order = [[0, 1], [6, 7], [2, 3], [4, 5]]
    alone, helped = (list(DataLoader(samples, batch_sampler=order, num_workers=workers)) for workers in (0, 2))
    for mine, theirs in zip(alone, helped, strict=True):
        assert torch.equal(mine["image"], theirs["image"])
        assert mine["subject"] == theirs["subject"]


def test_a_cohort_on_disk_trains_as_the_cohort_itself(tmp_path: Path) -> None:
    direct = open_cohort(6, seed=42, shape=SHAPE)
    for index, axes in enumerate(ORIENTATIONS):
        suffix = (".nii", ".nii.gz")[index % 2]
        path = tmp_path / axes / f"sub-{index:04d}{suffix}"
        write(path, np.asarray(direct.read(index)), axes=axes, affine=cohort_affine(SHAPE))
    files = open_nifti(tmp_path, patch=PATCH)
    assert [record.subject for record in files.records] == [record.subject for record in direct.records]
    assert split_subjects(files.records, validation=2, seed=1) == split_subjects(direct.records, validation=2, seed=1)
    config = AugmentationConfig()
    for augmentation in (None, config):
        ours, theirs = (dataset(volumes, augmentation=augmentation) for volumes in (direct, files))
        for position in range(8):
            assert ours[position]["subject"] == theirs[position]["subject"]
            assert torch.equal(ours[position]["image"], theirs[position]["image"])


def test_a_cohort_on_disk_at_another_resolution_is_within_interpolation_error(tmp_path: Path) -> None:
    direct = open_cohort(2, seed=42, shape=SHAPE)
    fine = (64, 72, 64)
    for index, axes in enumerate(("LPS", "SLA")):
        subject = cohort_subject(index, seed=42, shape=fine)
        write(tmp_path / f"sub-{index:04d}.nii.gz", subject, axes=axes, affine=cohort_affine(fine))
    files = open_nifti(tmp_path, patch=PATCH)
    for index in range(2):
        ours, theirs = load_volume(direct, index, SHAPE), load_volume(files, index, SHAPE)
        assert (ours - theirs).abs().mean() < 0.02
        assert torch.corrcoef(torch.stack([ours.ravel(), theirs.ravel()]))[0, 1] > 0.99


@given(
    st.lists(st.text("abc", max_size=3), min_size=2, max_size=12),
    st.integers(0, 2**63),
    st.integers(0, 6),
    st.randoms(),
)
def test_split_keeps_subjects_together_and_ignores_order(subjects: list, seed: int, validation: int, random) -> None:
    def record(subject: str) -> VolumeRecord:
        return VolumeRecord(subject, "", (1, 1, 1), 0.0, 1.0, UNIT)

    records = [record(subject) for subject in subjects]
    count = len(set(subjects))
    if validation >= count:
        with pytest.raises(InputError, match=f"{validation} subjects .* there are {count}"):
            split_subjects(records, validation=validation, seed=seed)
        return
    train, held_out = split_subjects(records, validation=validation, seed=seed)
    assert sorted(train + held_out) == list(range(len(records)))
    names = {records[index].subject for index in held_out}
    assert len(names) == validation
    assert not names & {records[index].subject for index in train}
    shuffled = random.sample(records, len(records))
    _, again = split_subjects(shuffled, validation=validation, seed=seed)
    assert {shuffled[index].subject for index in again} == names


def test_the_seed_chooses_the_split() -> None:
    records = Noise(20).records
    splits = {tuple(split_subjects(records, validation=5, seed=seed)[1]) for seed in range(10)}
    assert len(splits) > 5


def test_a_patch_larger_than_the_grid_is_named() -> None:
    with pytest.raises(InputError, match=r"\(6, 9, 6\) .* \(8, 8, 8\)"):
        PatchDataset(Noise(1), [0], grid=(8, 8, 8), patch=(6, 9, 6), seed=0)
    with pytest.raises(ValueError, match="indices is empty"):
        PatchDataset(Noise(1), [], grid=(8, 8, 8), patch=(6, 6, 6), seed=0)

"""A sample is a function of the seed and its position, whatever the volumes are stored in."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decovae.data import streams
from decovae.data.cohort import cohort_affine, cohort_subject, open_cohort
from decovae.data.foreground import FULL, foreground_places, places_on_grid
from decovae.data.loading import Collate, Finish
from decovae.data.nifti import open_nifti
from decovae.data.outbox import Outbox
from decovae.data.patches import Crop, PatchDataset, load_volume, split_subjects
from decovae.data.volumes import Shape, VolumeRecord, Volumes, affine_rows
from decovae.errors import InputError
from tests.data.files import ORIENTATIONS, write

SHAPE = (32, 36, 32)
PATCH = (16, 16, 16)
UNIT = affine_rows(np.eye(4))


class Noise:
    """Volumes in memory."""

    def __init__(self, count: int, shape: Shape = (10, 12, 8), *, foreground: bytes = b"") -> None:
        self.arrays = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
        self.records = [
            VolumeRecord(f"s{i}", f"memory:{i}", shape, 0.0, 1.0, UNIT, foreground=foreground) for i in range(count)
        ]

    def read(self, index: int) -> np.ndarray:
        return self.arrays[index]


def dataset(volumes: Volumes, *, seed: int = 0) -> PatchDataset:
    grid = volumes.records[0].shape
    patch = PATCH if grid == SHAPE else (6, 6, 6)
    return PatchDataset(volumes, range(len(volumes.records)), grid=grid, patch=patch, seed=seed)


def image(crop: Crop) -> torch.Tensor:
    """A crop as training sees it, `(D, H, W)`."""
    return Finish(None, seed=0, device=torch.device("cpu"))(Collate(None, Outbox(1))([crop]))["image"][0, 0]


def test_a_sample_is_a_function_of_seed_and_position() -> None:
    volumes = Noise(4)
    first, second = dataset(volumes), dataset(volumes)
    positions = [7, 0, 100_000, 7]
    samples = first.__getitems__(positions)
    for position, sample in zip(positions[::-1], samples[::-1], strict=True):
        assert sample.voxels.shape == (6, 6, 6)
        assert np.array_equal(second[position].voxels, sample.voxels)
        assert sample.position == position
    assert not np.array_equal(samples[0].voxels, samples[1].voxels)
    assert not np.array_equal(dataset(volumes, seed=1)[7].voxels, samples[0].voxels)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_visits_every_volume_once(epoch: int) -> None:
    samples = dataset(Noise(9))
    subjects = [samples[epoch * 9 + place].subject for place in range(9)]
    assert sorted(subjects) == [f"s{i}" for i in range(9)]
    assert subjects != [samples[(epoch + 1) * 9 + place].subject for place in range(9)]


def test_only_the_given_indices_are_drawn() -> None:
    volumes = Noise(5)
    samples = PatchDataset(volumes, [1, 4], grid=(10, 12, 8), patch=(6, 6, 6), seed=0)
    assert {samples[position].subject for position in range(20)} == {"s1", "s4"}


def test_a_dataset_holds_no_list_of_its_volumes() -> None:
    """Whose numbers a forked worker would come to own one by one, as it counts who refers to them."""
    held = {name: value for name, value in vars(dataset(Noise(50, (6, 6, 6)))).items() if name != "volumes"}
    assert held["indices"].nbytes == 50 * 8
    assert not [name for name, value in held.items() if isinstance(value, list | tuple | dict) and len(value) > 3]


def test_crops_reach_every_corner() -> None:
    volumes = Noise(1, (8, 7, 6))
    volumes.arrays[0] = np.arange(8 * 7 * 6).reshape(8, 7, 6)
    samples = PatchDataset(volumes, [0], grid=(8, 7, 6), patch=(6, 6, 6), seed=0)
    corners = Counter(int(samples[position].voxels[0, 0, 0]) for position in range(300))
    assert set(corners) == {(depth * 7 + height) * 6 for depth in range(3) for height in range(2)}
    assert min(corners.values()) > 25


def test_a_patch_is_a_crop_of_the_whole_resized_volume() -> None:
    volumes = Noise(1)
    grid = (14, 9, 13)
    samples = PatchDataset(volumes, [0], grid=grid, patch=(6, 9, 7), seed=0)
    windows = load_volume(volumes, 0, grid)[0].unfold(0, 6, 1).unfold(1, 9, 1).unfold(2, 7, 1)
    for position in range(5):
        distance = (windows - image(samples[position])).abs().amax((-3, -2, -1))
        assert distance.min() < 1e-5


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "uint16", "int32", "float16", "float32", "float64"])
def test_a_patch_of_a_volume_on_the_grid_is_a_crop_of_its_scaled_voxels(dtype: str) -> None:
    volumes = Noise(1)
    stored = (200 * np.random.default_rng(1).random((10, 12, 8))).astype(dtype).transpose(0, 2, 1)[:, ::-1]
    volumes.records = [replace(volumes.records[0], shape=(10, 8, 12), low=3.25, high=171.5)]
    volumes.read = lambda _: stored  # type: ignore[method-assign]
    samples = PatchDataset(volumes, [0], grid=(10, 8, 12), patch=(6, 6, 6), seed=0)
    whole = load_volume(volumes, 0, (10, 8, 12))[0]
    for position in range(4):
        depth, height, width = samples.corner(position, volumes.records[0])
        assert torch.equal(image(samples[position]), whole[depth:, height:, width:][:6, :6, :6])


def test_voxels_on_the_grid_travel_as_they_are_stored() -> None:
    volumes = Noise(1)
    volumes.arrays = (1000 * volumes.arrays).astype(np.int16)
    assert dataset(volumes)[3].voxels.dtype == np.int16


@given(
    grid=st.tuples(*[st.integers(6, 40)] * 3),
    patch=st.tuples(*[st.integers(1, 6)] * 3),
    share=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 100),
)
def test_as_many_patches_as_asked_for_contain_a_place_in_the_brain(
    grid: Shape, patch: Shape, share: float, seed: int
) -> None:
    volume = np.zeros((9, 10, 11))
    volume[4:6, 3:7, 8:10] = 1
    foreground = foreground_places(volume, low=0, high=1)
    volumes = Noise(1, grid, foreground=foreground)
    plain, aware = (
        PatchDataset(volumes, [0], grid=grid, patch=patch, seed=seed, foreground=foreground_share)
        for foreground_share in (0.0, share)
    )
    places = places_on_grid(foreground, grid)
    moved = 0
    for position in range(60):
        corner = np.array(aware.corner(position, volumes.records[0]))
        assert (corner >= 0).all()
        assert (corner + patch <= grid).all()
        chosen = streams.generator(seed, streams.FOREGROUND, position).random() < share
        if chosen:
            assert ((places >= corner) & (places < corner + patch)).all(1).any()
        else:
            assert tuple(corner) == plain.corner(position, volumes.records[0])
        moved += chosen
    assert moved == 60 if share == 1 else 5 <= moved <= 35


def test_patches_with_a_place_lie_anywhere_around_it() -> None:
    volume = np.zeros((20, 20, 20))
    volume[10, 10, 10] = 1
    place = np.array([10, 10, 10])
    foreground = ((place * 2 + 1) * FULL // 40).astype("<u2").tobytes()
    volumes = Noise(1, (20, 20, 20), foreground=foreground)
    samples = PatchDataset(volumes, [0], grid=(20, 20, 20), patch=(3, 14, 20), seed=0, foreground=1.0)
    corners = Counter(samples.corner(position, volumes.records[0]) for position in range(700))
    # The first axis has room on both sides of the place, the second is stopped by the grid's faces, the third is full.
    assert set(corners) == {(depth, height, 0) for depth in (8, 9, 10) for height in range(7)}
    assert min(corners.values()) > 10


def test_a_volume_without_known_places_is_cropped_anywhere() -> None:
    volumes = Noise(1)
    plain, aware = dataset(volumes), dataset(volumes)
    aware.foreground = 1.0
    assert [plain.corner(i, volumes.records[0]) for i in range(9)] == [
        aware.corner(i, volumes.records[0]) for i in range(9)
    ]


def test_a_cohort_on_disk_trains_as_the_cohort_itself(tmp_path: Path) -> None:
    direct = open_cohort(6, seed=42, shape=SHAPE)
    for index, axes in enumerate(ORIENTATIONS):
        suffix = (".nii", ".nii.gz")[index % 2]
        path = tmp_path / axes / f"sub-{index:04d}{suffix}"
        write(path, np.asarray(direct.read(index)), axes=axes, affine=cohort_affine(SHAPE))
    files = open_nifti(tmp_path, patch=PATCH)
    subjects = [record.subject for record in files.records]
    assert subjects == [record.subject for record in direct.records]
    ours, theirs = dataset(direct), dataset(files)
    for position in range(8):
        assert ours[position].subject == theirs[position].subject
        assert torch.equal(image(ours[position]), image(theirs[position]))


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
    count = len(set(subjects))
    if validation >= count:
        with pytest.raises(InputError, match=f"{validation} subjects .* there are {count}"):
            split_subjects(subjects, validation=validation, seed=seed)
        return
    train, held_out = split_subjects(subjects, validation=validation, seed=seed)
    assert sorted(train + held_out) == list(range(len(subjects)))
    names = {subjects[index] for index in held_out}
    assert len(names) == validation
    assert not names & {subjects[index] for index in train}
    shuffled = random.sample(subjects, len(subjects))
    _, again = split_subjects(shuffled, validation=validation, seed=seed)
    assert {shuffled[index] for index in again} == names


def test_the_seed_chooses_the_split() -> None:
    subjects = [f"s{index}" for index in range(20)]
    splits = {tuple(split_subjects(subjects, validation=5, seed=seed)[1]) for seed in range(10)}
    assert len(splits) > 5


def test_a_patch_larger_than_the_grid_is_named() -> None:
    with pytest.raises(InputError, match=r"6×9×6 .* 8×8×8"):
        PatchDataset(Noise(1), [0], grid=(8, 8, 8), patch=(6, 9, 6), seed=0)
    with pytest.raises(ValueError, match="indices is empty"):
        PatchDataset(Noise(1), [], grid=(8, 8, 8), patch=(6, 6, 6), seed=0)
    with pytest.raises(ValueError, match=r"foreground .* 1\.5"):
        PatchDataset(Noise(1), [0], grid=(8, 8, 8), patch=(6, 6, 6), seed=0, foreground=1.5)

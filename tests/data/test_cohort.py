"""The template cohort: the same brains everywhere, different from each other, and brains."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from decovae.data import cohort
from decovae.data.cohort import FULL_SHAPE, cohort_affine, cohort_subject, open_cohort
from decovae.data.deformation import centres, exponential, sample, smooth_field
from decovae.data.resample import resample_crop
from decovae.data.template import BOX_SIZE, tissue_maps
from decovae.errors import InputError

SHAPE = (32, 36, 32)


def digest(volume: np.ndarray) -> str:
    return sha256(volume.tobytes()).hexdigest()


def test_full_grid_is_uk_biobanks_turned_to_ras() -> None:
    uk_biobank = np.array([[-1, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1.0]])
    turned = uk_biobank @ np.array([[-1, 0, 0, FULL_SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(cohort_affine(FULL_SHAPE), turned)


def test_every_grid_covers_the_same_box() -> None:
    for shape in (SHAPE, (64, 72, 64), FULL_SHAPE):
        ends = cohort_affine(shape) @ np.array([[-0.5] * 3 + [1], [*np.subtract(shape, 0.5), 1]]).T
        np.testing.assert_allclose(ends[:3].T, [[-91.5, -126.5, -72.5], [90.5, 91.5, 109.5]])


def test_a_subject_is_the_same_in_every_process() -> None:
    program = (
        "from decovae.data.cohort import cohort_subject; from hashlib import sha256;"
        f"print(sha256(cohort_subject(3, seed=5, shape={SHAPE}).tobytes()).hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(cohort_subject(3, seed=5, shape=SHAPE))


def test_index_and_seed_make_the_subject() -> None:
    brains = [cohort_subject(index, seed=seed, shape=SHAPE) for seed in (0, 1) for index in (0, 1)]
    assert len({digest(brain) for brain in brains}) == 4
    correlations = np.corrcoef([brain.ravel() for brain in brains])[np.triu_indices(4, 1)]
    assert 0.8 < correlations.min() <= correlations.max() < 0.98  # of one kind, yet visibly different


def test_a_subject_is_a_skull_stripped_t1_weighted_brain() -> None:
    brain = cohort_subject(0, seed=0, shape=SHAPE)
    assert brain.dtype == np.float32
    assert brain.shape == SHAPE
    assert brain.min() == 0
    assert 300 < np.percentile(brain, 99.5) < 3000
    assert 0.5 < (brain == 0).mean() < 0.9
    for axis in range(3):  # nothing is cut off by the field of view, but for the brain stem at the bottom
        assert not np.take(brain, -1, axis).any()
        assert axis == 2 or not np.take(brain, 0, axis).any()


@pytest.mark.parametrize("index", range(4))
def test_tissues_keep_the_order_of_t1_weighting(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 72, 64)
    monkeypatch.setattr(cohort, "_warp", lambda generator, shape: centres(shape, BOX_SIZE))  # tissues stay in place
    brain = cohort_subject(index, seed=0, shape=shape)
    fluid, grey, white = (np.median(brain[share > 0.9]) for share in tissue_maps(shape).numpy()[:3])
    assert fluid < 0.7 * grey
    assert grey < 0.9 * white


def test_a_subject_is_the_same_brain_at_every_grid() -> None:
    fine = cohort_subject(2, seed=0, shape=(96, 108, 96))
    coarse = cohort_subject(2, seed=0, shape=(48, 54, 48))
    shrunk = resample_crop(fine, grid=coarse.shape, corner=(0, 0, 0), size=coarse.shape).numpy()
    stranger = cohort_subject(3, seed=0, shape=(48, 54, 48))
    assert np.corrcoef(shrunk.ravel(), coarse.ravel())[0, 1] > 0.995
    assert np.corrcoef(shrunk.ravel(), stranger.ravel())[0, 1] < 0.95


@pytest.mark.parametrize("index", range(6))
def test_the_warp_is_a_diffeomorphism(index: int) -> None:
    shape = (48, 54, 48)
    places = cohort._warp(np.random.Generator(np.random.Philox(index)), shape)
    steps = [length / size for length, size in zip(BOX_SIZE, shape, strict=True)]
    columns = [
        torch.diff(places, dim=axis + 1).div(step)[:, : shape[0] - 1, : shape[1] - 1, : shape[2] - 1]
        for axis, step in enumerate(steps)
    ]
    jacobian = torch.linalg.det(torch.stack(columns).permute(2, 3, 4, 1, 0))
    assert jacobian.min() > 0.05
    assert jacobian.max() < 8
    assert jacobian.std() > 0.1  # and it does deform


def test_the_flow_backward_undoes_the_flow_forward() -> None:
    extent = (64.0, 64.0, 64.0)
    velocity = 3 * smooth_field(np.random.default_rng(0), channels=3, spacing=24.0, extent=extent, shape=(32, 32, 32))
    there, back = exponential(velocity, extent=extent), exponential(-velocity, extent=extent)
    around = there + sample(back, centres((32, 32, 32), extent) + there, extent=extent, outside="border")
    inside = (slice(None), *[slice(8, -8)] * 3)
    assert around[inside].abs().max() < 0.1 * there[inside].abs().max()


def test_smooth_fields_have_unit_size_and_do_not_depend_on_the_grid() -> None:
    def field(shape: tuple[int, int, int]) -> torch.Tensor:
        generator = np.random.default_rng(1)
        return smooth_field(generator, channels=2, spacing=12.0, extent=(120.0, 96.0, 108.0), shape=shape)

    coarse, fine = field((20, 16, 18)), field((60, 48, 54))
    assert coarse.shape == (2, 20, 16, 18)
    torch.testing.assert_close(fine[:, 1::3, 1::3, 1::3], coarse, rtol=1e-4, atol=1e-5)
    assert fine.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_an_opened_cohort_holds_its_subjects(cache: Path) -> None:
    volumes = open_cohort(3, seed=9, shape=SHAPE)
    assert [record.subject for record in volumes.records] == ["sub-0000", "sub-0001", "sub-0002"]
    for index, record in enumerate(volumes.records):
        subject = cohort_subject(index, seed=9, shape=SHAPE)
        kept = volumes.read(index)
        np.testing.assert_array_equal(kept, subject)
        assert isinstance(kept, np.memmap)
        assert record.source == f"template:{index}"
        assert record.shape == SHAPE
        assert record.columns == {}
        np.testing.assert_array_equal(record.affine, cohort_affine(SHAPE))
        assert (record.low, record.high) == (0, pytest.approx(np.percentile(subject, 99.5), rel=1e-6))


def test_subjects_are_made_once_and_a_damaged_one_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(index: int, *, seed: int, shape: tuple[int, int, int]) -> np.ndarray:
        made.append(index)
        return cohort_subject(index, seed=seed, shape=shape)

    monkeypatch.setattr(cohort, "cohort_subject", counting)
    first = open_cohort(2, seed=0, shape=SHAPE)
    assert open_cohort(3, seed=0, shape=SHAPE).records[:2] == first.records
    assert sorted(made) == [0, 1, 2]
    (damaged,) = cache.rglob("sub-0001.npy")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    np.testing.assert_array_equal(open_cohort(3, seed=0, shape=SHAPE).read(1), cohort_subject(1, seed=0, shape=SHAPE))
    assert sorted(made) == [0, 1, 1, 2]


def test_several_openings_at_once_agree(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_cohort(2, seed=3, shape=SHAPE), range(4)))
    assert all(volumes.records == opened[0].records for volumes in opened)
    assert not list(cache.rglob(".*")), "temporary files are left"


def test_without_a_cache_the_cohort_lives_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(cohort.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("DECOVAE_CACHE", str(tmp_path / "file" / "cache"))
    volumes = open_cohort(1, seed=0, shape=SHAPE)
    np.testing.assert_array_equal(volumes.read(0), cohort_subject(0, seed=0, shape=SHAPE))
    assert list((tmp_path / "tmp").rglob("sub-0000.npy"))


@pytest.mark.parametrize("size", [0, -1, 10_001])
def test_size_out_of_range_is_named(size: int) -> None:
    with pytest.raises(InputError, match=f"1 to 10,000 subjects, not {size}"):
        open_cohort(size, seed=0, shape=SHAPE)

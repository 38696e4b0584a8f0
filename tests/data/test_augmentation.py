"""Augmentation does what its configuration says, the same for the same seed."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace

import pytest
import torch

from decovae.data.augmentation import Augmentation, AugmentationConfig

PATCH = (16, 16, 16)
OFF = replace(
    AugmentationConfig(),
    **{field.name: 0.0 for field in fields(AugmentationConfig) if field.name.endswith("probability")},
)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand((1, *PATCH), generator=torch.Generator().manual_seed(0))


def only(**changes: object) -> Augmentation:
    return Augmentation(replace(OFF, **changes), PATCH)


def test_same_seed_same_patch(image: torch.Tensor) -> None:
    original = image.clone()
    one, other = Augmentation(AugmentationConfig(), PATCH), Augmentation(AugmentationConfig(), PATCH)
    results = [one(image, seed=seed) for seed in range(20)]
    for seed in reversed(range(20)):
        assert torch.equal(other(image, seed=seed), results[seed])
    assert len({result.sum().item() for result in results}) > 10
    assert torch.equal(image, original), "the input is left alone"
    for result in results:
        assert type(result) is torch.Tensor
        assert result.dtype == torch.float32
        assert result.shape == image.shape
        assert result.isfinite().all()
        assert result.is_contiguous()


def test_nothing_on_changes_nothing(image: torch.Tensor) -> None:
    assert torch.equal(only()(image, seed=3), image)


@pytest.mark.parametrize("name", ["flip_probability", "turn_probability"])
def test_flips_and_turns_move_voxels_only(image: torch.Tensor, name: str) -> None:
    moved = only(**{name: 1.0})(image, seed=1)
    assert not torch.equal(moved, image)
    assert torch.equal(moved.ravel().sort().values, image.ravel().sort().values)


def test_flips_turn_every_axis_round(image: torch.Tensor) -> None:
    assert torch.equal(only(flip_probability=1.0)(image, seed=0), image.flip(1, 2, 3))


def test_intensities_are_scaled_and_shifted_within_their_bounds(image: torch.Tensor) -> None:
    factors = [(only(intensity_scale_probability=1.0)(image, seed=s) / image).mean().item() for s in range(30)]
    assert 0.9 <= min(factors) < 0.95
    assert 1.05 < max(factors) <= 1.1
    shifts = [(only(intensity_shift_probability=1.0)(image, seed=s) - image).mean().item() for s in range(30)]
    assert -0.05 <= min(shifts) < -0.03
    assert 0.03 < max(shifts) <= 0.05


def test_contrast_and_histogram_shift_keep_extremes(image: torch.Tensor) -> None:
    for changes in ({"contrast_probability": 1.0}, {"histogram_shift_probability": 1.0}):
        changed = only(**changes)(image, seed=2)
        assert (changed - image).abs().max() > 0.01
        torch.testing.assert_close(torch.stack(changed.aminmax()), torch.stack(image.aminmax()), rtol=0, atol=1e-4)
        order = image.ravel().argsort()
        assert (changed.ravel()[order].diff() >= -1e-5).all(), "brighter stays brighter"


def test_bias_field_is_a_smooth_positive_factor() -> None:
    field = only(bias_field_probability=1.0)(torch.ones((1, *PATCH)).index_fill(1, torch.tensor(0), 2.0), seed=0)[0, 1:]
    assert (field > 0).all()
    assert field.std() > 0.01
    assert field.diff(dim=1).abs().max() < 0.5 * field.max()


def test_gibbs_removes_fine_detail(image: torch.Tensor) -> None:
    rung = only(gibbs_probability=1.0)(image, seed=0)
    assert rung.std() < 0.7 * image.std()


def test_planes_that_are_not_square_are_not_turned() -> None:
    patch = (8, 8, 12)
    image = torch.rand((1, *patch))
    turn = Augmentation(replace(OFF, turn_probability=1.0), patch)
    results = [turn(image, seed=seed) for seed in range(10)]
    assert all(result.shape == image.shape for result in results)
    assert not any(torch.equal(result, image) for result in results)
    assert torch.equal(
        Augmentation(replace(OFF, turn_probability=1.0), (8, 10, 12))(torch.ones(1), seed=0), torch.ones(1)
    )


def test_air_passes_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augment = only(histogram_shift_probability=1.0)
        assert torch.equal(augment(torch.zeros((1, *PATCH)), seed=0), torch.zeros((1, *PATCH)))


def test_defaults_are_the_references() -> None:
    assert AugmentationConfig() == AugmentationConfig(
        bias_field_probability=0.3,
        bias_field_coefficients=(0.0, 0.3),
        gibbs_probability=0.3,
        gibbs_alpha=(0.5, 1.0),
        contrast_probability=0.3,
        contrast_gamma=(0.5, 2.0),
        histogram_shift_probability=0.05,
        histogram_shift_points=10,
        intensity_scale_probability=0.3,
        intensity_scale=0.1,
        intensity_shift_probability=0.3,
        intensity_shift=0.05,
        flip_probability=0.5,
        turn_probability=0.5,
    )

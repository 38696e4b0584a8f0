"""Augmentation is a function of seed, position and patch, in whatever batch and on whatever device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from decovae.data.augmentation import Augmentation, AugmentationConfig
from decovae.data.augmentation_draws import draw
from decovae.data.volumes import Shape
from decovae.errors import InputError

PATCH = (16, 16, 16)
PROBABILITIES = [field.name for field in fields(AugmentationConfig) if field.name.endswith("probability")]
OFF, OFTEN, ALWAYS = (
    replace(AugmentationConfig(), **cast(Any, dict.fromkeys(PROBABILITIES, chance))) for chance in (0.0, 0.5, 1.0)
)
UNEVEN = st.tuples(*[st.integers(2, 11)] * 3)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def patches(count: int, patch: Shape = PATCH, *, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, 1, *patch), generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.1


def only(patch: Shape = PATCH, **changes: Any) -> Augmentation:
    return Augmentation(replace(OFF, **changes), patch)


@pytest.mark.parametrize("patch", [PATCH, (9, 11, 13), (33, 40, 32)])
@pytest.mark.usefixtures("threads")
def test_neither_batch_nor_threads_change_a_bit(patch: Shape) -> None:
    images = patches(9, patch)
    augment = Augmentation(OFTEN, patch)
    torch.set_num_threads(1)
    whole = augment(images, range(20, 29), seed=5)
    assert torch.equal(augment(images, range(20, 29), seed=5), whole)
    torch.set_num_threads(3)
    order = [4, 0, 8, 2, 1]
    shuffled = augment(images[order], [20 + index for index in order], seed=5)
    assert torch.equal(shuffled, whole[order])
    strided = torch.stack([images[6], images[6]], dim=-1)[None, ..., 1]
    assert torch.equal(augment(strided, [26], seed=5), whole[6:7])
    assert torch.get_num_threads() == 3


def test_seeds_and_positions_differ() -> None:
    images = patches(1).expand(20, -1, -1, -1, -1)
    augment = Augmentation(AugmentationConfig(), PATCH)
    results = torch.cat([augment(images, range(20), seed=0), augment(images, range(20), seed=1)])
    assert len({result.sum().item() for result in results}) > 25


@settings(max_examples=40, deadline=None)
@given(patch=UNEVEN, seed=st.integers(0, 2**40), scale=st.sampled_from([1e-40, 1e-20, 1.0, 1e4]))
def test_finite_patches_of_any_size_stay_finite(patch: Shape, seed: int, scale: float) -> None:
    images = patches(4, patch, seed=seed % 1000) * scale
    original = images.clone()
    result = Augmentation(OFTEN, patch)(images, range(4), seed=seed)
    assert torch.equal(images, original), "the input is left alone"
    assert type(result) is torch.Tensor
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert result.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(patch=UNEVEN, seed=st.integers(0, 1000))
def test_all_at_once_is_one_by_one_up_to_rounding(patch: Shape, seed: int) -> None:
    images = patches(7, patch, seed=seed)
    images[3] = 0.25
    augment = Augmentation(OFTEN, patch)
    together = augment.together(images, [draw(OFTEN, patch, seed=seed, position=position) for position in range(7)])
    torch.testing.assert_close(together, augment(images, range(7), seed=seed), rtol=2e-5, atol=2e-5)
    assert together.is_contiguous()


@pytest.mark.parametrize("at_once", [False, True])
def test_nan_stays_in_its_sample(at_once: bool) -> None:
    images = patches(8)
    augment = Augmentation(ALWAYS, PATCH)
    draws = [draw(ALWAYS, PATCH, seed=2, position=position) for position in range(8)]

    def augmented(given: torch.Tensor) -> torch.Tensor:
        return augment.together(given, draws) if at_once else augment(given, range(8), seed=2)

    sound = augmented(images)
    images[3, 0, 5, 6, 7] = torch.nan
    result = augmented(images)
    assert result[3].isnan().any()
    others = [index for index in range(8) if index != 3]
    assert torch.equal(result[others], sound[others])


@pytest.mark.parametrize("name", PROBABILITIES)
def test_nan_is_never_hidden(name: str) -> None:
    images = patches(4)
    images[:, :, 0, 3, 9] = torch.nan
    result = only(PATCH, **{name: 1.0})(images, range(4), seed=0)
    assert result.flatten(1).isnan().any(dim=1).all()


def test_nothing_on_changes_nothing() -> None:
    images = patches(2)
    result = only()(images, range(2), seed=3)
    assert torch.equal(result, images)
    assert result.data_ptr() != images.data_ptr()


def test_air_stays_as_it_is_without_a_warning() -> None:
    images = torch.stack([torch.full((1, *PATCH), value) for value in (0.0, 0.7, -0.1)])
    augment = Augmentation(ALWAYS, PATCH)
    draws = [draw(ALWAYS, PATCH, seed=0, position=position) for position in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(augment(images, range(3), seed=0), images)
        assert torch.equal(augment.together(images, draws), images)


def test_a_patch_that_becomes_constant_on_the_way_stays_finite() -> None:
    cut = replace(ALWAYS, gibbs_alpha=(1.0, 1.0))  # everything, where sizes are even
    result = Augmentation(cut, PATCH)(patches(4), range(4), seed=0)
    assert result.isfinite().all()


def test_a_gpu_is_not_waited_for_and_no_devices_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: whatever asks for one, or adds a CPU's to a GPU's, raises."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode():
        images = torch.empty((12, 1, *PATCH), device="cuda")
        result = Augmentation(OFTEN, PATCH)(images, range(12), seed=0)
    assert result.device.type == "cuda"
    assert result.shape == images.shape
    assert result.is_contiguous()


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu() -> None:
    images = patches(6)
    augment = Augmentation(OFTEN, PATCH)
    expected = augment(images, range(6), seed=0)
    on_device = images.cuda()
    augment(on_device, range(6), seed=0)  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = augment(on_device, range(6), seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_another_probability_leaves_the_other_transforms_as_they_are() -> None:
    off = replace(OFTEN, gibbs_probability=0.0, histogram_shift_probability=0.0, flip_probability=0.0)
    for position in range(20):
        some = draw(off, PATCH, seed=0, position=position)
        all_ = draw(OFTEN, PATCH, seed=0, position=position)
        assert (some.contrast, some.scale, some.shift) == (all_.contrast, all_.scale, all_.shift)
        assert some.gibbs is None
        assert some.histogram_shift is None


def test_flips_and_turns_move_voxels_only() -> None:
    images = patches(6)
    for name in ("flip_probability", "turn_probability"):
        moved = only(PATCH, **{name: 1.0})(images, range(6), seed=1)
        assert not torch.equal(moved, images)
        assert torch.equal(moved.flatten(1).sort().values, images.flatten(1).sort().values)
    assert torch.equal(only(flip_probability=1.0)(images, range(6), seed=0), images.flip(2, 3, 4))


def test_planes_that_are_not_square_are_not_turned() -> None:
    images = patches(10, (8, 8, 12))
    results = only((8, 8, 12), turn_probability=1.0)(images, range(10), seed=0)
    assert results.shape == images.shape
    assert not any(torch.equal(result, image) for result, image in zip(results, images, strict=True))
    images = patches(4, (8, 10, 12))
    assert torch.equal(only((8, 10, 12), turn_probability=1.0)(images, range(4), seed=0), images)


def test_intensities_are_scaled_and_shifted_within_their_bounds() -> None:
    images = patches(1).expand(30, -1, -1, -1, -1) + 1
    factors = (only(intensity_scale_probability=1.0)(images, range(30), seed=0) / images).flatten(1).mean(dim=1)
    assert 0.9 <= factors.min() < 0.95
    assert 1.05 < factors.max() <= 1.1
    shifts = (only(intensity_shift_probability=1.0)(images, range(30), seed=0) - images).flatten(1).mean(dim=1)
    assert -0.0501 <= shifts.min() < -0.03
    assert 0.03 < shifts.max() <= 0.0501


@pytest.mark.parametrize("name", ["contrast_probability", "histogram_shift_probability"])
def test_contrast_and_histogram_shift_keep_extremes_and_order(name: str) -> None:
    image = patches(1)
    changed = only(PATCH, **{name: 1.0})(image, [2], seed=2)
    assert (changed - image).abs().max() > 0.01
    torch.testing.assert_close(torch.stack(changed.aminmax()), torch.stack(image.aminmax()), rtol=0, atol=1e-4)
    assert (changed.ravel()[image.ravel().argsort()].diff() >= -1e-5).all(), "brighter stays brighter"


@pytest.mark.parametrize(
    "changes",
    [
        {"gibbs_alpha": (0.5, 1.5)},
        {"gibbs_alpha": (-0.5, 0.5)},
        {"bias_field_coefficients": (0.3, 0.0)},
        {"contrast_gamma": (0.0, 2.0)},
        {"contrast_gamma": (float("nan"), 2.0)},
        {"contrast_gamma": (0.5, float("inf"))},
        {"bias_field_coefficients": (float("-inf"), 0.3)},
        {"intensity_scale": float("inf")},
        {"intensity_shift": float("inf")},
        {"histogram_shift_points": 2},
        {"intensity_scale": -0.1},
        {"flip_probability": 50.0},
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(InputError, match=f"--data.augmentation.{name.replace('_', '-')} "):
        Augmentation(replace(OFF, **changes), PATCH)


@pytest.mark.parametrize(
    ("images", "positions"),
    [
        (torch.rand(2, 1, *PATCH), range(3)),
        (torch.rand(2, 1, 16, 16, 8), range(2)),
        (torch.rand(2, *PATCH), range(2)),
        (torch.rand(2, 1, *PATCH, dtype=torch.float64), range(2)),
    ],
)
def test_other_images_than_agreed_are_refused(images: torch.Tensor, positions: range) -> None:
    with pytest.raises(ValueError, match=r"not \d patches"):
        Augmentation(OFF, PATCH)(images, positions, seed=0)


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

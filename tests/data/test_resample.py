"""A crop is resampled from what it covers, and is the same as a crop of the whole resampled."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from decovae.data import resample
from decovae.data.resample import axis_weights, resample_crop, resample_true_size, true_size
from tests.data.files import noise

sizes = st.tuples(*[st.integers(1, 20)] * 3)


def whole(volume: np.ndarray, grid: tuple[int, int, int]) -> torch.Tensor:
    return resample_crop(volume, grid=grid, corner=(0, 0, 0), size=grid)


@given(sizes, sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_crop_equals_crop_of_the_whole(source: tuple, grid: tuple, data: st.DataObject) -> None:
    volume = noise(source)
    corner = tuple(data.draw(st.integers(0, size - 1)) for size in grid)
    size = tuple(data.draw(st.integers(1, room - start)) for room, start in zip(grid, corner, strict=True))
    crop = resample_crop(volume, grid=grid, corner=corner, size=size)
    where = tuple(slice(start, start + count) for start, count in zip(corner, size, strict=True))
    torch.testing.assert_close(crop, whole(volume, grid)[where], rtol=1e-5, atol=1e-4)


@given(sizes, st.tuples(*[st.integers(0, 20)] * 3))
@settings(max_examples=30, deadline=None)
def test_enlarging_is_trilinear_interpolation(source: tuple, growth: tuple) -> None:
    volume = noise(source)
    grid = tuple(size + more for size, more in zip(source, growth, strict=True))
    expected = F.interpolate(torch.from_numpy(volume)[None, None].double(), grid, mode="trilinear")[0, 0]
    torch.testing.assert_close(whole(volume, grid).double(), expected, rtol=1e-5, atol=1e-3)


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_shrinking_is_antialiased_as_in_torch(source: int, target: int) -> None:
    line = torch.from_numpy(noise((1, source))).double()
    expected = F.interpolate(line[None, None], (1, target), mode="bilinear", antialias=True)[0, 0, 0]
    touched, weights = axis_weights(source, target, 0, target)
    torch.testing.assert_close(torch.from_numpy(weights) @ line[0, touched], expected, rtol=1e-5, atol=1e-4)


def test_same_grid_copies_the_voxels() -> None:
    volume = noise()
    assert torch.equal(whole(volume, volume.shape), torch.from_numpy(volume))


def test_result_does_not_depend_on_memory_layout() -> None:
    volume = noise((13, 9, 11))
    turned = np.asfortranarray(volume[::-1])[::-1]
    assert turned.strides != volume.strides
    assert torch.equal(whole(turned, (7, 15, 11)), whole(volume, (7, 15, 11)))


@given(sizes, sizes, st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_bits_depend_neither_on_threads_nor_on_layout(source: tuple, grid: tuple, threads: int) -> None:
    volume = noise(source)
    expected = whole(volume, grid)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            laid = np.ascontiguousarray(volume.transpose(order)).transpose(np.argsort(order))
            assert torch.equal(whole(laid, grid), expected)
    finally:
        torch.set_num_threads(before)


@given(sizes, sizes, st.tuples(*[st.sampled_from([0.3, 0.7, 1.0, 1.00001, 1.9, 30.0])] * 3))
@settings(max_examples=60, deadline=None)
def test_true_size_weighs_what_lies_around_each_place(source: tuple, grid: tuple, ratios: tuple) -> None:
    """Against every weight written down: a triangle around the place, as wide as the larger of the two voxels."""
    volume = noise(source).astype(np.float64)
    expected = volume
    for axis, (size, target, ratio) in enumerate(zip(source, grid, ratios, strict=True)):
        first, step = true_size(size, target, ratio)
        assert abs(first + (target - 1) / 2 * step - (size - 1) / 2) <= 0.5 + 1e-9
        places = first + step * np.arange(target)
        weights = np.maximum(1 - np.abs(np.arange(size) - places[:, None]) / max(step, 1), 0)
        weights /= weights.sum(axis=1, keepdims=True) + 1e-300
        weights[(places < -0.5) | (places > size - 0.5)] = 0
        expected = np.moveaxis(np.tensordot(weights, expected, (1, axis)), 0, axis)
    found = resample_true_size(volume, grid=grid, ratios=ratios)
    assert found.shape == grid
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-3)


@given(sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_voxels_of_the_same_size_are_copied(source: tuple, grid: tuple) -> None:
    volume = noise(source)
    found = resample_true_size(volume, grid=grid, ratios=(1.0, 1.0, 1.0)).numpy()
    theirs, ours = [], []
    for size, target in zip(source, grid, strict=True):
        start = (size - target) // 2
        ours.append(slice(max(-start, 0), min(size - start, target)))
        theirs.append(slice(max(start, 0), min(start + target, size)))
    padded = np.zeros(grid, np.float32)
    padded[tuple(ours)] = volume[tuple(theirs)]
    assert np.array_equal(found, padded)


def test_voxels_away_from_the_crop_are_not_touched() -> None:
    volume = noise((40, 40, 40))
    volume[24:] = np.nan
    crop = resample_crop(volume, grid=(20, 20, 20), corner=(0, 0, 0), size=(10, 20, 20))
    assert crop.isfinite().all()


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i2", "int32", "float64", ">f4"])
def test_scaling_is_exact_for_every_stored_type(dtype: str) -> None:
    volume = np.linspace(0, 100, 6 * 7 * 8).reshape(6, 7, 8).astype(dtype)
    scaled = resample_crop(volume, grid=volume.shape, corner=(0, 0, 0), size=volume.shape, low=10, high=60)
    assert scaled.dtype == torch.float32
    np.testing.assert_allclose(scaled.numpy(), (volume.astype(np.float64) - 10) / 50, atol=1e-6)


def test_large_offsets_keep_their_contrast() -> None:
    volume = 1e9 + np.arange(27, dtype=np.float64).reshape(3, 3, 3)
    scaled = resample_crop(volume, grid=(3, 3, 3), corner=(0, 0, 0), size=(3, 3, 3), low=1e9, high=1e9 + 26)
    np.testing.assert_allclose(scaled.numpy().ravel(), np.arange(27) / 26, atol=1e-6)


@pytest.mark.parametrize("source", [(512, 512, 2), (512, 2, 512), (2, 512, 512)])
def test_what_lies_between_is_not_larger_than_what_goes_in_or_comes_out(source: tuple[int, int, int]) -> None:
    volume = np.asfortranarray(noise(source).astype(np.uint8))
    tracemalloc.start()
    try:
        whole(volume, (32, 32, 32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4 * volume.size


def test_too_large_in_between_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "MOST", 3000)
    with pytest.raises(ValueError, match=r"is 20×20×20 voxels, and to resize it to 10×10×10 takes .* in between"):
        whole(noise((20, 20, 20)), (10, 10, 10))
    assert whole(noise((20, 20, 20)), (20, 20, 30)).shape == (20, 20, 30)


@given(sizes, sizes, st.tuples(*[st.sampled_from([-1, 1])] * 3), st.permutations([0, 1, 2]))
@settings(max_examples=40, deadline=None)
def test_pieces_and_flips_do_not_show(source: tuple, grid: tuple, flips: tuple, order: list) -> None:
    volume = noise(source)
    expected = whole(volume, grid)
    flipped = tuple(slice(None, None, flip) for flip in flips)
    laid = np.ascontiguousarray(volume[flipped].transpose(order)).transpose(np.argsort(order))[flipped]
    before = resample.PIECE
    try:
        resample.PIECE = 50
        assert torch.equal(whole(laid, grid), expected)
    finally:
        resample.PIECE = before

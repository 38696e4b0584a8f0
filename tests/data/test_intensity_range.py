"""The range is exactly NumPy's percentiles of the same values in float64, without sorting them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from decovae.data.volumes import in_memory_order, intensity_range
from tests.data.files import noise

DTYPES = ["uint8", "int8", "int16", ">i2", "uint16", "int32", "float32", ">f4", "float64"]


def assert_exact(volume: np.ndarray, inverted: bool) -> None:
    found = intensity_range(volume, inverted=inverted)
    expected = np.percentile(volume.astype(np.float64), (100.0, 0.5) if inverted else (0.0, 99.5))
    assert found == tuple(expected.tolist())


@given(
    volume=st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            st.tuples(*[st.integers(1, 9)] * 3),
            elements=(
                {"min_value": -(2.0**40), "max_value": 2.0**40} if "f" in dtype else None  # type: ignore[arg-type]
            ),
        )
    ),
    inverted=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_small_volumes_of_any_values(volume: np.ndarray, inverted: bool) -> None:
    low, high = np.percentile(volume.astype(np.float64), (100.0, 0.5) if inverted else (0.0, 99.5))
    if low == high:
        with pytest.raises(ValueError, match="is constant"):
            intensity_range(volume, inverted=inverted)
    else:
        assert_exact(volume, inverted)


SHAPE = (70, 80, 60)
LARGE = {
    "noise": noise(SHAPE),
    "integers with many ties": noise(SHAPE).astype(np.int16),
    "mostly air": np.where(noise(SHAPE) > 600, noise(SHAPE), 0).astype(np.float32),
    "bright background": np.where(noise(SHAPE) > 600, noise(SHAPE), 1000).astype(np.int16),
    "few bright voxels": (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 100 == 0).astype(np.uint8),
    "in step with the sample": (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 5).astype(np.float32),
    "extremes of 16 bits": np.where(noise(SHAPE) > 200, 32767, -32768).astype(np.int16),
    "a ramp": np.arange(np.prod(SHAPE), dtype=np.float64).reshape(SHAPE),
    "a falling ramp": -np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE),
}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_large_volumes_whatever_their_distribution(name: str, inverted: bool) -> None:
    assert_exact(LARGE[name], inverted)
    assert_exact(np.asfortranarray(LARGE[name])[::-1, :, ::-1], inverted)


def test_a_sample_that_misleads_costs_time_and_not_exactness() -> None:
    volume = np.zeros(1 << 18, np.int16)
    volume[:: 1 << 2] = 1000  # every voxel of the sample
    volume[1::64] = np.arange(1 << 12)
    for inverted in (False, True):
        assert_exact(volume.reshape(64, 64, 64), inverted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 77, -1])
def test_one_value_that_is_no_number(value: float, place: int) -> None:
    volume = noise((20, 20, 20))
    volume.ravel()[place] = value
    for inverted in (False, True):
        with pytest.raises(ValueError, match="NaN or infinite"):
            intensity_range(volume, inverted=inverted)


def test_a_range_that_overflows() -> None:
    with pytest.raises(ValueError, match="too far apart"):
        intensity_range(np.array([-1.7e308, 1.7e308] * 32).reshape(4, 4, 4))


@pytest.mark.parametrize("flips", [(-1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_voxels_are_taken_as_they_lie_in_memory(flips: tuple[int, int, int]) -> None:
    volume = np.asfortranarray(noise((5, 6, 7)))[tuple(slice(None, None, flip) for flip in flips)]
    values = in_memory_order(volume)
    assert np.shares_memory(values, volume)
    assert np.array_equal(np.sort(values), np.sort(volume.ravel()))
    read_only = volume.view()
    read_only.flags.writeable = False
    assert_exact(read_only, inverted=False)

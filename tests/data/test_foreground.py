"""Places in the brain: bright ones, the same share of the box on every grid, whatever a file's axes and type."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from decovae.data.foreground import PLACES, foreground_places, places_on_grid
from decovae.data.volumes import Shape
from tests.data.files import noise


def ball(shape: Shape = (30, 36, 24)) -> np.ndarray:
    """A bright ball in the dark."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    return (sum(axis**2 for axis in axes) < 0.4).astype(np.float32)


def test_places_are_bright_and_spread() -> None:
    volume = ball()
    places = places_on_grid(foreground_places(volume, low=0, high=1), volume.shape)
    assert places.shape == (PLACES, 3)
    assert volume[tuple(places.T)].all()
    assert (np.ptp(places, axis=0) > np.array(volume.shape) / 3).all()


@given(st.tuples(*[st.integers(1, 300)] * 3), st.integers(0, 5))
def test_a_place_is_its_own_voxel_on_the_volume_s_grid(shape: Shape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    voxel = tuple(int(rng.integers(size)) for size in shape)
    # A volume that is bright in one voxel, and which knows its value anywhere: no memory is taken for the rest.
    volume = np.broadcast_to(np.ones((1, 1, 1), np.int8), shape)
    places = places_on_grid(foreground_places(volume, low=0, high=1), shape)
    assert (places >= 0).all()
    assert (places < shape).all()
    share = np.array([(2 * place + 1) * 65536 // (2 * size) for place, size in zip(voxel, shape, strict=True)])
    assert tuple(places_on_grid(share.astype("<u2").tobytes(), shape)[0]) == voxel


def test_another_grid_over_the_same_box_has_the_same_places() -> None:
    volume = ball()
    foreground = foreground_places(volume, low=0, high=1)
    coarse = (places_on_grid(foreground, (15, 12, 8)) + 0.5) / (15, 12, 8)
    fine = (places_on_grid(foreground, (60, 90, 72)) + 0.5) / (60, 90, 72)
    assert (np.abs(coarse - fine) <= 0.5 / np.array((15, 12, 8)) + 0.5 / np.array((60, 90, 72))).all()


def test_an_inverted_scale_and_another_layout_change_nothing() -> None:
    volume = ball()
    expected = foreground_places(volume, low=0, high=1)
    assert foreground_places(7 - volume, low=7, high=6) == expected
    assert foreground_places(np.asfortranarray(volume * 100).astype(">i2"), low=0, high=100) == expected
    assert foreground_places(np.zeros((9, 9, 9)), low=0, high=1) == b""
    assert foreground_places(noise(), low=0, high=1) == foreground_places(noise(), low=0, high=1)

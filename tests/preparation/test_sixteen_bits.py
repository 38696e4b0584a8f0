"""Sixteen bits hold any range as finely as they can, and nothing wraps round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decovae.preparation.sixteen_bits import sixteen_bits


def values(darkest: float, brightest: float) -> torch.Tensor:
    ends = torch.tensor([darkest, brightest, 0.0, 1.0]).clamp(darkest, brightest)
    between = torch.linspace(darkest, brightest, 2 * 3 * 1000 - 4)
    return torch.cat([ends, between]).clamp(darkest, brightest).reshape(2, 3, 1000)


@given(st.floats(-20, 20, width=32), st.floats(2**-20, 60000, width=32))
@settings(max_examples=200, deadline=None)
def test_every_value_is_within_half_a_step(darkest: float, spread: float) -> None:
    scaled = values(darkest, darkest + spread)
    low, high = (float(extreme) for extreme in torch.aminmax(scaled))
    if low == high:
        return
    stored, zero, one = sixteen_bits(scaled.clone(), darkest=low, brightest=high)
    back = (stored.astype(np.float64) - zero) / (one - zero)
    error = np.abs(back - scaled.numpy())
    span = max(high, 0.0) - min(low, 0.0)
    if stored.dtype == np.int16:
        step = 1 / (one - zero)
        assert step <= 2**-11
        assert step <= 2 * span / 65534  # no more than a bit is given away for steps that are powers of two
        assert error.max() <= step / 2
    else:
        assert span > 31
        assert (error <= np.maximum(2**-11 * np.abs(scaled.numpy()), 2**-24)).all()


@pytest.mark.parametrize("brightest", [65505.0, 1e30])
def test_what_16_bits_cannot_hold_is_refused(brightest: float) -> None:
    with pytest.raises(ValueError, match="outliers"):
        sixteen_bits(values(0.0, brightest), darkest=0.0, brightest=brightest)


@pytest.mark.parametrize("brightest", [float("inf"), float("nan")])
def test_what_is_no_number_is_refused(brightest: float) -> None:
    with pytest.raises(ValueError, match="too far apart"):
        sixteen_bits(torch.ones(2, 2, 2), darkest=0.0, brightest=brightest)


def test_constant_on_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="constant"):
        sixteen_bits(torch.full((2, 2, 2), 0.5), darkest=0.5, brightest=0.5)

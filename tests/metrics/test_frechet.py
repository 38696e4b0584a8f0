"""The Fréchet distance against scipy's matrix square root, MONAI, closed forms, and itself in pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from decovae.metrics.frechet import FeatureMoments, feature_moments, frechet_distance


def features(count: int, width: int, *, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated, skewed, of different scales, as features of a network are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scales = torch.logspace(-2, 1, width, dtype=torch.float64)
    raw = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing * scales
    return raw.clamp(min=-0.5 * scales) + shift * scales


def by_definition(a: torch.Tensor, b: torch.Tensor) -> float:
    first, second = (np.cov(each.numpy(), rowvar=False) for each in (a, b))
    shift = (a.mean(0) - b.mean(0)).numpy()
    root = sqrtm(first @ second)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


@pytest.mark.parametrize(("count", "width"), [(200, 3), (300, 16), (600, 64)])
def test_distance_agrees_with_scipys_square_root_to_ten_digits(count: int, width: int) -> None:
    a, b = features(count, width, seed=1), features(2 * count, width, seed=2, shift=0.1)
    measured = frechet_distance(feature_moments(a), feature_moments(b))
    assert measured == pytest.approx(by_definition(a, b), rel=1e-10)


def test_distance_agrees_with_monai_to_eight_digits() -> None:
    from monai.metrics import FIDMetric

    a, b = features(300, 16, seed=1), features(250, 16, seed=2, shift=0.2)
    measured = frechet_distance(feature_moments(a), feature_moments(b))
    assert measured == pytest.approx(float(FIDMetric()(a, b)), rel=1e-8)


def test_distance_of_gaussians_in_one_dimension_is_known() -> None:
    a, b = features(50, 1, seed=1), features(70, 1, seed=2, shift=3.0)
    expected = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)
    assert frechet_distance(feature_moments(a), feature_moments(b)) == pytest.approx(expected, rel=1e-12)


def test_distance_of_a_scaled_and_shifted_set_is_known_also_where_covariances_are_singular() -> None:
    # N(μ, Σ) and N(cμ + m, c²Σ): ‖(c − 1)μ + m‖² + (c − 1)² tr Σ. Ten samples span nine of forty dimensions.
    for count in (10, 400):
        a = features(count, 40, seed=1)
        b = 1.5 * a + 0.25
        moments = feature_moments(a)
        expected = (0.5 * moments.mean + 0.25).square().sum() + 0.25 * moments.covariance.trace()
        assert frechet_distance(moments, feature_moments(b)) == pytest.approx(float(expected), rel=1e-11)


def test_sets_that_share_no_direction_are_as_far_as_their_variances() -> None:
    # Turned, so that no variance is zero but for rounding.
    turn, _ = torch.linalg.qr(features(60, 60, seed=3))
    a, b = features(300, 30, seed=1) @ turn[:30], features(400, 30, seed=2) @ turn[30:]
    first, second = feature_moments(a), feature_moments(b)
    shift = first.mean - second.mean
    expected = float(shift @ shift + first.covariance.trace() + second.covariance.trace())
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-11)


def test_a_set_is_at_no_distance_from_itself_and_the_distance_is_symmetric() -> None:
    for count, width in ((100, 8), (5, 30), (2, 4)):
        a, b = feature_moments(features(count, width, seed=1)), feature_moments(features(count + 3, width, seed=2))
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12 * float(a.covariance.trace()))
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
        assert frechet_distance(a, b) > 0
    constant = feature_moments(torch.ones(4, 3))
    assert frechet_distance(constant, constant) == 0
    assert frechet_distance(constant, feature_moments(torch.full((7, 3), 3.0))) == pytest.approx(12)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=5, unique=True), offset=st.sampled_from([0.0, 1e3]))
def test_moments_do_not_depend_on_how_samples_come(cuts: list[int], offset: float) -> None:
    samples = features(60, 7, seed=3) + offset
    parts = [feature_moments(part) for part in np.split(samples, sorted(cuts))]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    expected = np.cov(samples.numpy(), rowvar=False)
    assert merged.count == 60
    np.testing.assert_allclose(merged.mean.numpy(), samples.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance.numpy(), expected, rtol=1e-8, atol=1e-11)


def test_moments_are_float64_whatever_the_features_are() -> None:
    samples = features(40, 5, seed=1)
    for dtype in (torch.bfloat16, torch.float32):
        moments = feature_moments(samples.to(dtype))
        assert moments.mean.dtype == moments.scatter.dtype == torch.float64
        torch.testing.assert_close(moments.covariance, samples.to(dtype).double().T.cov(), rtol=1e-10, atol=1e-12)


def test_features_that_are_not_finite_show() -> None:
    samples = features(10, 3, seed=1)
    finite = feature_moments(samples)
    for value in (math.nan, math.inf):
        samples[2, 1] = value
        assert math.isnan(frechet_distance(feature_moments(samples), finite))


def test_wrong_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="int64"):
        feature_moments(torch.zeros(4, 2, dtype=torch.int64))
    for shape in ((4,), (0, 3), (2, 3, 4)):
        with pytest.raises(ValueError, match="at least one sample"):
            feature_moments(torch.zeros(shape))
    one, two = feature_moments(torch.zeros(1, 2)), feature_moments(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(two, one)
    other = feature_moments(torch.zeros(2, 3))
    for use in (frechet_distance, FeatureMoments.merge):
        with pytest.raises(ValueError, match="2 and of 3 features"):
            use(two, other)

"""Fidelity and diversity against their definitions, pair by pair, and in cases with a known answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decovae.metrics import fidelity
from decovae.metrics.fidelity import density_coverage, kernel_distance, precision_recall


def clouds(real: int = 70, generated: int = 50, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(real, width, generator=generator)
    second = 0.8 * torch.randn(generated, width, generator=generator) + 0.4
    return first + 5, second + 5  # far from zero, as features after a ReLU are


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def radius(samples: Tensor, place: int, k: int) -> float:
    return sorted(distance(samples[place], other) for at, other in enumerate(samples) if at != place)[k - 1]


@pytest.fixture(params=[7, 512])
def _rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do and that do not divide the sets."""
    monkeypatch.setattr(fidelity, "ROWS", request.param)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_their_definition(k: int) -> None:
    real, generated = clouds()
    balls = [radius(real, place, k) for place in range(len(real))]
    precise = [any(distance(sample, x) <= r for x, r in zip(real, balls, strict=True)) for sample in generated]
    balls = [radius(generated, place, k) for place in range(len(generated))]
    recalled = [any(distance(x, y) <= r for y, r in zip(generated, balls, strict=True)) for x in real]
    measured = precision_recall(real, generated, k=k)
    assert 0 < measured.precision < 1
    assert measured.precision == pytest.approx(sum(precise) / len(generated), abs=1e-12)
    assert measured.recall == pytest.approx(sum(recalled) / len(real), abs=1e-12)


@pytest.mark.usefixtures("_rows")
def test_density_and_coverage_equal_their_definition() -> None:
    real, generated = clouds()
    balls = [radius(real, place, 5) for place in range(len(real))]
    inside = [[distance(x, y) < r for y in generated] for x, r in zip(real, balls, strict=True)]
    measured = density_coverage(real, generated)
    assert measured.density == pytest.approx(sum(map(sum, inside)) / (5 * len(generated)), abs=1e-12)
    assert measured.coverage == pytest.approx(sum(map(any, inside)) / len(real), abs=1e-12)


@pytest.mark.usefixtures("_rows")
def test_kernel_distance_equals_its_definition() -> None:
    real, generated = (each.double() for each in clouds(23, 17))

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def within(samples: Tensor) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(samples) for j, b in enumerate(samples) if i != j]
        return sum(pairs) / len(pairs)

    between = sum(kernel(a, b) for a in real for b in generated) / (len(real) * len(generated))
    assert kernel_distance(real, generated) == pytest.approx(within(real) + within(generated) - 2 * between, rel=1e-9)


def test_kernel_distance_agrees_with_torchmetrics_to_nine_digits() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Features(torch.nn.Module):
        num_features = 6

        def forward(self, features: Tensor) -> Tensor:
            return features

    real, generated = (each.double() for each in clouds(40, 40))
    metric = kid.KernelInceptionDistance(feature=Features(), subsets=2, subset_size=40)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert kernel_distance(real, generated) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    same = [
        kernel_distance(torch.randn(40, 4, generator=generator), torch.randn(30, 4, generator=generator))
        for _ in range(200)
    ]
    values = torch.tensor(same)
    assert values.min() < 0
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5


def test_the_same_set_is_perfect_and_a_distant_one_is_not() -> None:
    real, _ = clouds()
    same, dense = precision_recall(real, real), density_coverage(real, real)
    assert (same.precision, same.recall, dense.density, dense.coverage) == (1, 1, 1, 1)
    far, sparse = precision_recall(real, real + 100), density_coverage(real, real + 100)
    assert (far.precision, far.recall, sparse.density, sparse.coverage) == (0, 0, 0, 0)
    assert kernel_distance(real, real + 100) > 1e3


def test_generated_samples_of_one_mode_are_precise_and_recall_little() -> None:
    generator = torch.Generator().manual_seed(2)
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0]]).repeat_interleave(40, dim=0)
    real = modes + torch.randn(80, 2, generator=generator)
    generated = torch.randn(80, 2, generator=generator)
    measured, dense = precision_recall(real, generated), density_coverage(real, generated)
    assert measured.precision > 0.9
    assert measured.recall == pytest.approx(0.5, abs=0.05)
    assert dense.coverage == pytest.approx(0.5, abs=0.05)


def test_samples_that_differ_by_rounding_alone_are_one_sample() -> None:
    # Slices of background: the same features but for the last bit, and neighbours at distance zero.
    generator = torch.Generator().manual_seed(3)
    blank = 3 + torch.rand(1, 64, generator=generator)
    jitter = 1 + 1e-7 * torch.randn(20, 64, generator=generator)
    measured = precision_recall(blank * jitter[:10], blank * jitter[10:])
    assert (measured.precision, measured.recall) == (1, 1)
    assert density_coverage(blank * jitter[:10], blank * jitter[10:]).coverage == 1


def test_wrong_input_is_refused_by_name() -> None:
    real, generated = clouds()
    with pytest.raises(ValueError, match="at least 4 samples"):
        precision_recall(real, generated[:3])
    with pytest.raises(ValueError, match="more than 5 samples, got 5"):
        density_coverage(real[:5], generated)
    with pytest.raises(ValueError, match="at least 2 samples"):
        kernel_distance(real, generated[:1])
    for measure in (precision_recall, density_coverage, kernel_distance):
        with pytest.raises(ValueError, match=r"\(50, 5\)"):
            measure(real, generated[:, :5])
        with pytest.raises(TypeError, match="int64"):
            measure(real, generated.long())
        with pytest.raises(ValueError, match="finite"):
            measure(real, generated * torch.nan)
    for neighbours in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="not 0"):
            neighbours(real, generated, k=0)

"""Flows on toy distributions with a known velocity u and a known solution: what training and solvers are wrong by.

A network v is wrong by e = v − u, and a sample by what that adds up to along its path x̂ (Alekseev, Gröbner):

    δ = x̂₁ − X₁ = ∫ ∂X₁/∂X_t · e(x̂_t, t) dt,

X₁ the exact solution from the same noise, ∂X₁/∂X_t how far the exact flow from x̂_t on spreads what is near. Means of
samples are wrong by at most √E|δ|², and standard deviations too (the triangle inequality), beside 4 standard errors.

Between noise and a Gaussian of standard deviation s, x_t has σ_t² = (1−t)² + t²s², and ∂X₁/∂X_t = s / σ_t: so to first
order in e, E|δ|² ≤ ∫ s²/σ_t² dt · ∫ E|e(x_t, t)|² dt = πs/2 · E|e|². In one dimension a flow keeps quantiles, so
∂X₁/∂X_t = p_t(x̂_t) / p₁(X₁).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from decovae.generation.flow_matching import TimeSchedule, bridge, flow_matching_loss
from decovae.generation.solvers import integrate
from tests.generation.toy import Gaussian, Mixture, Voxelwise, train

UNIFORM = TimeSchedule(scale=1.0, base_voxels=8)  # for latents of 2×2×2 voxels: r = 1
SHAPE = (2, 2, 2)
SECOND_ORDER = 1.25
"""Room for what the first order leaves out, of the size of e/u, which training brings below this."""

GAUSSIAN = Gaussian([1.0, -0.5], [[0.8, 0.35], [0.35, 0.4]])
TWO_MODES = Mixture([0.3, 0.7], [-1.5, 1.0], [0.4, 0.3])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than these few numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def standard(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def grid(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def test_training_recovers_a_gaussian() -> None:
    torch.manual_seed(0)
    network = Voxelwise(2)
    train(
        network,
        lambda generator: GAUSSIAN.end(standard((256, 2, *SHAPE), generator)),
        lambda count, generator: UNIFORM.draw(torch.rand(count, dtype=torch.float64, generator=generator), 8),
        steps=1000,
    )
    network.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # What training left: the loss above its least, which is E Var(x₁ − x₀ | x_t) = Σ ∫ s²/σ_t² dt = Σ πs/2.
        count = 8192
        t = torch.rand(count, dtype=torch.float64, generator=generator)
        data, noise = (GAUSSIAN.end(standard((count, 2, *SHAPE), generator)), standard((count, 2, *SHAPE), generator))
        x = bridge(noise, data, t)
        squared_error = float((network(x, t) - GAUSSIAN.velocity(x, t)).square().sum(1).mean())
        losses = 2 * flow_matching_loss(network, data, noise, t).double()  # a sum over the two channels, not a mean
        least = math.pi / 2 * float(GAUSSIAN.stds.sum())
        assert abs(losses.mean() - least - squared_error) < 4 * losses.std() / math.sqrt(count)
        assert squared_error < 0.01 * least

        start = standard((2500, 2, *SHAPE), generator)
        samples = integrate(network, start, grid(32), solver="heun")
    exact = GAUSSIAN.end(start)
    wrong = float((samples - exact).square().sum(1).mean().sqrt())
    derived = SECOND_ORDER * math.sqrt(math.pi / 2 * float(GAUSSIAN.stds.max()) * squared_error)
    assert wrong < derived
    assert derived < 0.1

    vectors = samples.movedim(1, -1).flatten(0, -2)
    trace, count = float(GAUSSIAN.covariance.trace()), len(vectors)
    assert (vectors.mean(0) - GAUSSIAN.mean).norm() < derived + 4 * math.sqrt(trace / count)
    # |Cov(x̂) − Cov(X)| ≤ δ (2σ + δ); an entry of a sample covariance has the variance (Σ_ii Σ_jj + Σ_ij²) / n.
    variances = GAUSSIAN.covariance.diag()
    sampling = ((variances.outer(variances) + GAUSSIAN.covariance**2) / count).sum().sqrt()
    moved = derived * (2 * math.sqrt(trace) + derived)
    assert (vectors.T.cov() - GAUSSIAN.covariance).norm() < moved + 4 * sampling


def test_training_recovers_two_modes() -> None:
    torch.manual_seed(0)
    network = Voxelwise(1)
    train(
        network,
        lambda generator: TWO_MODES.sample((256, 1, *SHAPE), generator),
        lambda count, generator: UNIFORM.draw(torch.rand(count, dtype=torch.float64, generator=generator), 8),
        steps=1200,
    )
    network.double()
    with torch.no_grad():
        start = standard((1000, 1, *SHAPE), torch.Generator().manual_seed(1))
        samples, error = transported_error(network, start)
    wrong = samples - TWO_MODES.end(start.flatten())
    # Both integrals are sums of 64 steps, of the second order.
    assert (wrong - error).square().mean().sqrt() < 0.05 * error.square().mean().sqrt()
    derived = 1.05 * float(error.square().mean().sqrt())
    assert derived < 0.1 * (TWO_MODES.means[1] - TWO_MODES.means[0])

    std, count = math.sqrt(TWO_MODES.variance), len(samples)
    assert abs(samples.mean() - TWO_MODES.mean) < derived + 4 * std / math.sqrt(count)
    # A sample variance has the variance σ⁴ (kurtosis − 1) / n, and a standard deviation half of it relative to itself.
    assert abs(samples.std() - std) < derived + 4 * std * math.sqrt((TWO_MODES.kurtosis - 1) / (4 * count))
    # Whoever is on the wrong side of an edge between the modes was moved by more than a gap, a share of at most
    # (derived / gap)² by Chebyshev, or belongs within a gap of the edge, where hardly anything is.
    edge, gap = -0.2, 0.3
    below = float((samples < edge).double().mean())
    edges = torch.tensor([edge - gap, edge, edge + gap], dtype=torch.float64)
    near, truth, far = TWO_MODES.share(edges, torch.ones((), dtype=torch.float64)).tolist()
    assert abs(below - truth) < (derived / gap) ** 2 + far - near + 4 * math.sqrt(truth * (1 - truth) / count)


def transported_error(network: torch.nn.Module, start: Tensor) -> tuple[Tensor, Tensor]:
    """Samples, and what δ is for each by its integral."""
    x, times = start, grid(64)
    total = torch.zeros_like(start.flatten())
    for place, t in enumerate(times):
        voxels = x.flatten()
        error = network(x, t).flatten() - TWO_MODES.velocity(voxels, t)
        end = TWO_MODES.quantile(TWO_MODES.share(voxels, t))
        spread = TWO_MODES.density(voxels, t) / TWO_MODES.density(end, times[-1])
        total += spread * error / (64 if 0 < place < 64 else 128)
        if place < 64:
            x = integrate(network, x, times[place : place + 2], solver="heun")
    return x.flatten(), total


@pytest.mark.parametrize("std", [0.5, 1.8])
def test_solvers_are_wrong_on_a_gaussian_by_what_their_order_says(std: float) -> None:
    """With σ'' = s²/σ³ the leading terms are integrals that are known, relative to what the noise becomes.

    Euler: −½ ∫ σ''/σ dt / steps. Heun: −∫ (σ'σ''/4σ − σ'''/12) / σ dt / steps² = (s⁻² − s²) / 8 / steps². For the
    midpoint method that integrand is σ'''/24 + σ'σ''/8σ = 0: on a Gaussian its error falls faster than its order says.
    """
    mixture = Mixture([1.0], [0.7], [std])
    start = torch.tensor([[1.0], [-0.4]], dtype=torch.float64)

    def relative_error(solver: str, steps: int) -> Tensor:
        end = integrate(mixture.velocity, start, grid(steps), solver=solver)
        return (end - 0.7) / (std * start) - 1

    t = grid(20000)
    euler = -0.5 * torch.trapezoid(std**2 / ((1 - t) ** 2 + t**2 * std**2) ** 2, t)
    heun = (std**-2 - std**2) / 8
    for steps in (64, 256):
        # The next term is smaller by a factor of about 1/steps, times how fast u changes: at most 16 here.
        room = 16 / steps
        assert (steps * relative_error("euler", steps) / euler - 1).abs().max() < room
        assert (steps**2 * relative_error("heun", steps) / heun - 1).abs().max() < room
        assert (steps**2 * relative_error("midpoint", steps)).abs().max() < room * abs(heun)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_error_on_two_modes_falls_as_the_solver_s_order_says(solver: str, order: int) -> None:
    start = torch.linspace(-2, 2, 41, dtype=torch.float64)
    exact = TWO_MODES.end(start)
    # On even steps, and on those of a schedule, which are smaller near the data or the noise.
    uneven = TimeSchedule(scale=2.0, base_voxels=8)
    for times in (grid, lambda steps: uneven.times(steps, 8)):
        errors = [
            float((integrate(TWO_MODES.velocity, start, times(steps), solver=solver) - exact).square().mean().sqrt())
            for steps in (200, 400, 800)
        ]
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_a_solution_leads_back_to_its_noise() -> None:
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for solver in ("heun", "midpoint"):
        end = integrate(TWO_MODES.velocity, start, grid(800), solver=solver)
        back = integrate(TWO_MODES.velocity, end, grid(800).flip(0), solver=solver)
        # Both ways have an error of the second order, and the way back spreads the first one's by p₁/p₀ at most.
        wrong = (end - TWO_MODES.end(start)).abs()
        assert (back - start).abs().max() < 100 * wrong.max()
        assert (back - start).abs().max() < 1e-2


@pytest.mark.parametrize("tolerance", [1e-4, 1e-5, 1e-7])
def test_dopri5_is_within_its_tolerance(tolerance: float) -> None:
    """Every step adds at most tolerance · (1 + |x|) in the root mean square, and the flow spreads it by s/σ_t."""
    std = 0.5
    mixture = Mixture([1.0], [0.7], [std])
    start = torch.linspace(-2, 2, 64, dtype=torch.float64)[None]
    calls: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return mixture.velocity(x, t)

    found = integrate(velocity, start, grid(1), solver="dopri5", tolerance=tolerance)
    wrong = (found - 0.7 - std * start).square().mean().sqrt()
    steps = len(calls) / 6  # evaluations that a step takes, the rejected ones' counted too
    size = float(start.square().mean().sqrt())
    spread = std / math.sqrt(std**2 / (1 + std**2))  # the least σ_t is s/√(1 + s²)
    assert wrong < steps * tolerance * (1 + size) * spread

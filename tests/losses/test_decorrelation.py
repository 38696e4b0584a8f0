"""SID, COV, VAR and VAD against their equations in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decovae import (
    CovarianceLoss,
    SIDLoss,
    VADLoss,
    VarianceLoss,
    channel_statistics,
    covariance_loss,
    sid_loss,
    vad_loss,
    variance_loss,
)
from decovae.losses.moments import ChannelMoments, channel_moments
from tests.channel_cases import DEVICE, IMPLEMENTATIONS, Case, assert_gradient_close, cases, implementation

pytestmark = pytest.mark.device

Loss = Callable[..., torch.Tensor]


def covariance_and_correlation(mu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    samples = mu.double().movedim(1, 0).flatten(1)
    constant = (samples == samples[:, :1]).all(dim=1)
    covariance = torch.cov(samples).reshape(len(samples), len(samples))
    covariance = torch.where(constant[:, None] | constant, 0.0, covariance)
    deviation = torch.where(constant, 1.0, covariance.diagonal()).sqrt()
    return covariance, covariance / deviation[:, None] / deviation


def sid_equation(mu: torch.Tensor) -> torch.Tensor:
    _, r = covariance_and_correlation(mu)
    return (r - r.diagonal().diag()).square().sum() / len(r) ** 2


def covariance_equation(mu: torch.Tensor) -> torch.Tensor:
    sigma, _ = covariance_and_correlation(mu)
    return (sigma - sigma.diagonal().diag()).square().sum() / len(sigma) ** 2


def variance_equation(mu: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    sigma, _ = covariance_and_correlation(mu)
    varying = sigma.diagonal()[sigma.diagonal() > 0]
    constant = len(sigma) - len(varying)
    return ((gamma - varying.sqrt()).relu().square().sum() + constant * gamma**2) / len(sigma)


def squared_variance_equation(mu: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    sigma, _ = covariance_and_correlation(mu)
    return (sigma.diagonal() - gamma).square().mean()


def vad_equation(mu: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    return covariance_equation(mu) + variance_equation(mu, gamma)


SQUARED_VARIANCE = functools.partial(variance_loss, form="squared")
EQUATIONS: list[tuple[Loss, Loss]] = [
    (sid_loss, sid_equation),
    (covariance_loss, covariance_equation),
    (functools.partial(variance_loss, gamma=2.5), functools.partial(variance_equation, gamma=2.5)),
    (SQUARED_VARIANCE, squared_variance_equation),
    (functools.partial(vad_loss, gamma=2.5), functools.partial(vad_equation, gamma=2.5)),
]
LOSSES: list[Loss] = [sid_loss, covariance_loss, variance_loss, SQUARED_VARIANCE, vad_loss]


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_losses_equal_their_equations(case: Case) -> None:
    assert_losses_equal_their_equations(case, "torch")


@pytest.mark.parametrize("name", [IMPLEMENTATIONS[1]])
@pytest.mark.parametrize(
    "case",
    [
        Case(5, 1, (9,), torch.float16, "contiguous", 3.0, seed=1),
        Case(2, 4, (5, 3, 4), torch.bfloat16, "channels_last", 1000.0, seed=2),
        Case(3, 7, (4, 5), torch.float32, "transposed", 10_000.0, seed=3),
        Case(34, 16, (), torch.float32, "channel_slice", 0.0, seed=4),
    ],
    ids=str,
)
def test_losses_equal_their_equations_in_triton(name: str, case: Case) -> None:
    assert_losses_equal_their_equations(case, name)


def assert_losses_equal_their_equations(case: Case, name: str) -> None:
    mu = case.latent().requires_grad_()
    truth_mu = mu.detach().double().requires_grad_()
    factor = mu.numel()  # keeps the gradients within float16's range
    with implementation(name):
        for loss, equation in EQUATIONS:
            value, truth = loss(mu), equation(truth_mu)
            assert value.dtype == torch.float32
            assert value.shape == ()
            # d² of a difference d of two nearly equal numbers near 1, γ and √Σ_ii or Σ_ii: a rounding of δ, a few units
            # in the last place of float32, changes it by 2dδ + δ².
            anchored = loss not in (sid_loss, covariance_loss)
            floor = 1e-10 + (2 * math.sqrt(truth.item()) * 5e-7 if anchored else 0)
            torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=floor)
            (gradient,) = torch.autograd.grad(value * factor, [mu])
            (truth_gradient,) = torch.autograd.grad(truth * factor, [truth_mu])
            assert_gradient_close(gradient, truth_gradient)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_in_float64(loss: Loss) -> None:
    mu = torch.randn(2, 4, 3, 2, 3, dtype=torch.float64, device=DEVICE) * 0.5 + 3
    assert loss(mu).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, [mu.requires_grad_()])


@settings(max_examples=30, deadline=None)
@given(exponents=st.lists(st.integers(-12, 12), min_size=4, max_size=4))
def test_sid_does_not_depend_on_scale(exponents: list[int]) -> None:
    case = Case(2, 4, (6, 5), torch.float32, "contiguous", 3.0, seed=1)
    scales = torch.tensor([10.0**exponent for exponent in exponents], device=DEVICE).view(1, 4, 1, 1)
    mu = (case.latent() * scales).requires_grad_()
    truth_mu = mu.detach().double().requires_grad_()
    value, truth = sid_loss(mu), sid_equation(truth_mu)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, [mu])
    (truth_gradient,) = torch.autograd.grad(truth, [truth_mu])
    assert_gradient_close(gradient * scales, truth_gradient * scales)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_constant_channels_are_uncorrelated_and_have_finite_gradients(name: str, loss: Loss) -> None:
    mu = torch.randn(2, 4, 5, 5, device=DEVICE)
    mu[:, 1] = 0.1
    mu[:, 3] = -1e4
    mu.requires_grad_()
    with implementation(name):
        value = loss(mu)
        (gradient,) = torch.autograd.grad(value, [mu])
        torch.testing.assert_close(sid_loss(mu), sid_loss(mu[:, [0, 2]]) / 4)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, [1, 3]] == 0).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_input_is_never_a_silent_zero(name: str, channels: int, bad: float, loss: Loss) -> None:
    mu = torch.randn(2, channels, 4, 4, device=DEVICE)
    mu[1, -1, 2, 2] = bad
    with implementation(name):
        assert not loss(mu).isfinite()
        mu[:, -1] = bad
        assert not loss(mu).isfinite()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # numpy's, in the interpreter
def test_squares_beyond_float32_are_never_a_silent_zero(name: str) -> None:
    mu = torch.randn(2, 2, 50, device=DEVICE) * torch.tensor([1e25, 1e-10], device=DEVICE).view(1, 2, 1)
    with implementation(name):
        value = sid_loss(mu)
    assert not value.isfinite() or torch.isclose(value.double(), sid_equation(mu))


def test_anchor_holds_where_it_is_nearly_met() -> None:
    """Standard normal latents: √Σ_ii is within 1 % of γ, and (γ − √Σ_ii)² magnifies any error of Σ_ii."""
    mu = torch.randn(2, 4, 24, 24, 24, generator=torch.Generator().manual_seed(0)) + 2
    torch.testing.assert_close(variance_loss(mu).double(), variance_equation(mu), rtol=1e-5, atol=0)
    torch.testing.assert_close(SQUARED_VARIANCE(mu).double(), squared_variance_equation(mu), rtol=1e-5, atol=0)


def test_modules_are_the_functions() -> None:
    mu = torch.randn(2, 4, 3, 3, 3, device=DEVICE) * 0.4
    assert torch.equal(SIDLoss()(mu), sid_loss(mu))
    assert torch.equal(CovarianceLoss()(mu), covariance_loss(mu))
    assert torch.equal(VarianceLoss()(mu), variance_loss(mu))
    assert torch.equal(VADLoss(gamma=0.7)(mu), vad_loss(mu, 0.7))
    assert torch.equal(VADLoss(form="squared")(mu), vad_loss(mu, form="squared"))
    torch.testing.assert_close(vad_loss(mu), covariance_loss(mu) + variance_loss(mu), rtol=1e-6, atol=0)
    assert "gamma=0.7" in repr(VADLoss(gamma=0.7))


def test_losses_share_moments() -> None:
    mu = torch.randn(2, 4, 3, 3, 3, device=DEVICE)
    moments = channel_moments(mu)
    for loss in LOSSES:
        assert torch.equal(loss(moments), loss(mu))


def test_two_samples_are_enough() -> None:
    torch.testing.assert_close(sid_loss(torch.tensor([[1.0, 5.0], [2.0, 3.0]])), torch.tensor(0.5))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_a_graph_break_or_a_recompilation(loss: Loss) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for volumes in (2, 3, 5):
        mu = torch.randn(volumes, 4, 3, 5, 4, device=DEVICE, requires_grad=True)
        value, eager = compiled(mu), loss(mu)
        torch.testing.assert_close(value, eager)
        torch.testing.assert_close(torch.autograd.grad(value, [mu]), torch.autograd.grad(eager, [mu]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast_changes_nothing() -> None:
    mu = torch.randn(2, 4, 6, 6, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        lowered = vad_loss(mu)
    assert torch.equal(lowered, vad_loss(mu))


@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_input_is_refused_by_name(loss: Loss) -> None:
    for dtype in (torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype)):
            loss(torch.zeros(4, 2).to(dtype))
    with pytest.raises(ValueError, match=r"\(5,\)"):
        loss(torch.zeros(5))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        loss(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        loss(torch.zeros(0, 3, 4))


def test_wrong_options_are_refused_by_name() -> None:
    mu = torch.randn(4, 2)
    for make in (functools.partial(vad_loss, mu), functools.partial(variance_loss, mu), VADLoss, VarianceLoss):
        with pytest.raises(ValueError, match="'cubic'"):
            make(form="cubic")
        for gamma in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"got {gamma}"):
                make(gamma=gamma)
    with pytest.raises(ValueError, match="group"):
        sid_loss(channel_moments(mu), group=object())


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_channel_statistics(case: Case) -> None:
    z = case.latent()
    statistics = channel_statistics(z)
    covariance, correlation = covariance_and_correlation(z)
    assert statistics.count == z.numel() // case.channels
    for value in (statistics.mean, statistics.covariance, statistics.correlation):
        assert value.dtype == torch.float32
    deviation = covariance.diagonal().sqrt()
    mean = z.double().movedim(1, 0).flatten(1).mean(1)
    torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-6, atol=1e-6)
    assert ((statistics.covariance - covariance).abs() <= 1e-5 * deviation[:, None] * deviation + 1e-12).all()
    torch.testing.assert_close(statistics.correlation.double(), correlation, rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_merged_moments_are_those_of_the_whole(sizes: list[int]) -> None:
    z = torch.randn(sum(sizes), 3, 2, dtype=torch.float64, device=DEVICE) + 100
    z[:, 2] = 0.1
    merged, *rest = (channel_moments(part) for part in z.split(sizes))
    for part in rest:
        merged = merged.merge(part)
    whole = channel_moments(z)
    assert isinstance(merged, ChannelMoments)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.covariance, whole.covariance)
    assert (merged.correlation[2] == 0).all()

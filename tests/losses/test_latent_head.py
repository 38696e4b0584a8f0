"""LatentHead as a VAE calls it: modes, random state, groups, and the losses on its moments."""

from __future__ import annotations

import pytest
import torch

from decovae import LatentHead, analyze_latents, channel_moments, sid_loss, vad_loss
from decovae.losses.latent_head import kl_divergence
from tests.channel_cases import DEVICE

pytestmark = pytest.mark.device


def posterior(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    mu, log_variance = torch.randn(2, *(shape or (2, 4, 3, 5, 6)), device=DEVICE)
    return mu, log_variance


def test_it_replaces_sampling_kl_and_decorrelation() -> None:
    mu, log_variance = posterior()
    z, kl, moments = LatentHead()(mu, log_variance)
    epsilon = (z - mu) / (0.5 * log_variance).exp()
    assert 0.8 < epsilon.std() < 1.2
    torch.testing.assert_close(kl, kl_divergence(mu, log_variance))
    for loss in (sid_loss, vad_loss):
        torch.testing.assert_close(loss(moments), loss(mu))
    assert analyze_latents(moments).effective_rank == pytest.approx(analyze_latents(channel_moments(mu)).effective_rank)


def test_evaluation_takes_the_mean() -> None:
    mu, log_variance = posterior()
    head = LatentHead().eval()
    z, kl, moments = head(mu, log_variance)
    assert z is mu
    torch.testing.assert_close(kl, kl_divergence(mu, log_variance))
    torch.testing.assert_close(moments.packed, channel_moments(mu).packed)
    assert not torch.equal(head(mu, log_variance, sample=True).z, mu)
    assert LatentHead()(mu, log_variance, sample=False).z is mu


def test_a_call_draws_one_integer_from_torch_s_generator_whatever_the_shape() -> None:
    states = []
    for shape in ((2, 4, 3), (5, 2, 7, 7)):
        torch.manual_seed(5)
        LatentHead()(*(torch.zeros(shape, device=DEVICE),) * 2)
        states.append(torch.rand(1, device=DEVICE))
    torch.manual_seed(5)
    torch.randint(2**63 - 1, (1,), device=DEVICE)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], torch.rand(1, device=DEVICE))


def test_the_same_state_gives_the_same_sample_and_the_next_call_another() -> None:
    mu, log_variance = posterior()
    head = LatentHead()
    torch.manual_seed(1)
    first, second = head(mu, log_variance).z, head(mu, log_variance).z
    torch.manual_seed(1)
    assert torch.equal(head(mu, log_variance).z, first)
    assert not torch.equal(first, second)


def test_a_given_seed_leaves_torch_s_generator_alone() -> None:
    mu, log_variance = posterior()
    head = LatentHead()
    torch.manual_seed(1)
    expected = torch.rand(1, device=DEVICE)
    torch.manual_seed(1)
    z = head(mu, log_variance, seed=3, offset=9).z
    assert torch.equal(torch.rand(1, device=DEVICE), expected)
    assert torch.equal(head(mu, log_variance, seed=3, offset=9).z, z)
    assert not torch.equal(head(mu, log_variance, seed=3, offset=8).z, z)


def test_a_batch_in_parts_is_sampled_as_the_whole() -> None:
    mu, log_variance = posterior(5, 4, 3, 5, 6)
    head = LatentHead()
    whole = head(mu, log_variance, seed=3, first=10).z
    parts = [head(mu[some], log_variance[some], seed=3, first=10 + some.start).z for some in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    assert not torch.equal(head(mu, log_variance, seed=3).z, whole)


def test_gradients_reach_both_inputs() -> None:
    mu, log_variance = (x.requires_grad_() for x in posterior())
    z, kl, moments = LatentHead()(mu, log_variance, seed=1)
    grads = torch.autograd.grad(z.square().mean() + kl + vad_loss(moments), [mu, log_variance])
    epsilon = (z - mu).detach() / (0.5 * log_variance.detach()).exp()
    plain = mu + (0.5 * log_variance).exp() * epsilon
    expected = torch.autograd.grad(
        plain.square().mean() + kl_divergence(mu, log_variance) + vad_loss(mu), [mu, log_variance]
    )
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_a_head_has_nothing_to_save() -> None:
    assert not LatentHead().state_dict()


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        LatentHead()(torch.zeros(1, 3), torch.zeros(1, 3))

"""The latent head: every implementation against its equations in float64, and what its noise may depend on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from decovae_kernels import latent_head, reference
from decovae_kernels.philox import normals, philox
from tests.channel_cases import (
    DEVICE,
    IMPLEMENTATIONS,
    LAYOUTS,
    Case,
    arrange,
    assert_gradient_close,
    cases,
    implementation,
)

pytestmark = pytest.mark.device


def seed(value: int = 2**62 + 12345) -> torch.Tensor:
    return torch.full((1,), value, device=DEVICE)


def noise(shape: tuple[int, ...], value: int = 2**62 + 12345, offset: int = 0, first: int = 0) -> torch.Tensor:
    """ε of a latent of this shape: what the head adds to μ = 0 at σ = 1."""
    zero = torch.zeros(shape, device=DEVICE)
    return latent_head(zero, zero, seed(value), offset=offset, first=first)[0]


@settings(max_examples=25, deadline=None)
@given(case=cases(offsets=(0.0, 3.0)))
def test_values_and_gradients_equal_the_equations(case: Case) -> None:
    assert_values_and_gradients(case, "torch")


@pytest.mark.parametrize("name", [IMPLEMENTATIONS[1]])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, torch.float16), (3, torch.float32), (4, torch.bfloat16), (8, torch.float32)]
)
def test_triton_equals_the_equations(name: str, layout: str, channels: int, dtype: torch.dtype) -> None:
    assert_values_and_gradients(Case(3, channels, (5, 7), dtype, layout, 1.0, seed=channels), name)


@pytest.mark.parametrize("name", [IMPLEMENTATIONS[1]])
@pytest.mark.parametrize("channels", [12, 40])
def test_triton_goes_over_many_channels_in_parts(name: str, channels: int) -> None:
    assert_values_and_gradients(Case(2, channels, (40,), torch.float32, "contiguous", 1.0, seed=0), name)


def assert_values_and_gradients(case: Case, name: str) -> None:
    mu = case.latent().requires_grad_()
    log_variance = arrange(torch.randn_like(mu.detach().contiguous()), case.layout).requires_grad_()
    with implementation(name):
        z, kl, packed = latent_head(mu, log_variance, seed())
        epsilon = noise(tuple(mu.shape)).double()
    truth_mu, truth_lv = (x.detach().double().requires_grad_() for x in (mu, log_variance))
    truth_z, truth_kl, truth_packed = reference.latent_head(truth_mu, truth_lv, epsilon)

    assert (z.dtype, z.shape, kl.dtype) == (mu.dtype, mu.shape, torch.float32)
    assert_gradient_close(z, truth_z)
    torch.testing.assert_close(kl.double(), truth_kl, rtol=1e-5, atol=1e-7)
    bound = 1e-5 * truth_packed.abs().max()
    assert ((packed - truth_packed).abs() <= bound).all()

    generator = torch.Generator().manual_seed(case.seed)
    upstream = torch.randn(z.shape, generator=generator).to(z)
    weights = torch.randn(packed.shape, generator=generator, dtype=torch.float64).to(packed.device)
    scale = 1 / mu.numel()  # keeps the gradients of the moments within float16's range
    with implementation(name):
        grads = torch.autograd.grad(
            [z, kl, packed], [mu, log_variance], [upstream, kl.new_tensor(0.5), weights * scale]
        )
    truth = torch.autograd.grad(
        [truth_z, truth_kl, truth_packed],
        [truth_mu, truth_lv],
        [upstream.double(), truth_kl.new_tensor(0.5), weights * scale],
    )
    for actual, expected in zip(grads, truth, strict=True):
        assert_gradient_close(actual, expected)


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123's Philox4x32-10."""
    for word, expected in (
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        words = torch.full((1,), word)
        assert [int(value) for value in philox([words] * 4, (words, words))] == expected


def test_noise_is_standard_normal_and_independent() -> None:
    drawn = normals(torch.tensor([3]), 0, 0, 250_000, 4).double()
    assert (drawn.mean(1).abs() < 0.01).all()
    assert ((drawn.std(1) - 1).abs() < 0.01).all()
    assert ((drawn**4).mean(1) - 3).abs().max() < 0.1
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.01
    assert (drawn[:, 1:] * drawn[:, :-1]).mean(1).abs().max() < 0.01
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).cdf(levels.float())
    for channel in drawn:
        below = (channel[:, None] <= levels).double().mean(0)
        assert (below - expected).abs().max() < 0.005


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_noise_depends_on_seed_offset_and_place_alone(name: str) -> None:
    shape = (3, 6, 5, 7, 9)
    with implementation("torch"):
        expected = noise(shape)
    with implementation(name):
        torch.testing.assert_close(noise(shape), expected, rtol=1e-5, atol=2e-6)
        # Not on the batch that it is drawn in, nor on the number of channels …
        torch.testing.assert_close(noise((2, *shape[1:])), expected[:2], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(noise((3, 5, *shape[2:])), expected[:, :5], rtol=1e-5, atol=2e-6)
        # … nor on layout or dtype.
        zero = torch.zeros(shape, device=DEVICE)
        for layout in LAYOUTS:
            arranged = (
                arrange(zero, layout) if layout not in ("batch_slice", "channel_slice", "spatial_slice") else zero
            )
            drawn = latent_head(arranged, arranged, seed())[0]
            torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=2e-6)
        half = latent_head(zero.bfloat16(), zero.bfloat16(), seed())[0]
        torch.testing.assert_close(half.float(), expected, rtol=2**-7, atol=1e-6)
        for other in (noise(shape, value=1), noise(shape, offset=1), noise(shape, value=2**62 + 12345 + 2**33)):
            assert abs(torch.corrcoef(torch.stack([other.flatten(), expected.flatten()]))[0, 1]) < 0.05


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 12, 1, 3, 5), (4, 4)])
def test_parts_of_a_batch_are_together_the_whole(name: str, layout: str, shape: tuple[int, ...]) -> None:
    """As processes share it: each says with which volume it begins, and KL divergences are averaged."""
    mu, log_variance, upstream = (arrange(x, layout) for x in torch.randn(3, *shape, device=DEVICE))

    def run(part: slice) -> tuple[torch.Tensor, ...]:
        leaves = [x[part].detach().requires_grad_() for x in (mu, log_variance)]
        z, kl, _ = latent_head(*leaves, seed(), offset=3, first=6 + part.start)
        share = len(z) / len(mu)
        return z, *torch.autograd.grad([z, kl], leaves, [upstream[part], kl.new_tensor(5 * share)]), kl * share

    with implementation(name):
        *whole, kl = run(slice(0, 4))
        found = [run(slice(*ends)) for ends in ((0, 1), (1, 3), (3, 4))]
        *parts, divergences = zip(*found, strict=True)
        assert not torch.equal(whole[0], latent_head(mu, log_variance, seed(), offset=3, first=5)[0])
    torch.testing.assert_close([torch.cat(part) for part in parts], whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(divergences), kl)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_volumes_are_numbered_in_64_bits(name: str) -> None:
    with implementation(name):
        for first in (1, 2**30, 2**31, 2**32 - 1):
            expected = normals(seed(), 7, 15 * first, 15, 4).view(1, 4, 3, 5)
            drawn = noise((1, 4, 3, 5), offset=7, first=first)
            torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_non_finite_latents_show(name: str) -> None:
    mu, log_variance = torch.randn(2, 2, 4, 30, device=DEVICE)
    mu[1, 2, 3] = torch.inf
    log_variance[0, 1, 5] = torch.nan
    with implementation(name):
        z, kl, packed = latent_head(mu, log_variance, seed())
    assert not kl.isfinite()
    assert not packed.isfinite().all()
    assert not z[1, 2, 3].isfinite()
    assert z[0, 1, 5].isnan()
    assert z[:, 3].isfinite().all()


def test_gradcheck_in_float64() -> None:
    mu, log_variance = torch.randn(2, 2, 3, 4, 2, dtype=torch.float64, device=DEVICE).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: latent_head(a, b, seed()), [mu.detach().requires_grad_(), log_variance]
    )


def test_empty_batch() -> None:
    z, kl, packed = latent_head(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), torch.zeros(1, dtype=torch.int64))
    assert z.shape == (0, 3, 4)
    assert kl.isnan()
    assert (packed == 0).all()


def test_wrong_input_is_refused_by_name() -> None:
    mu = torch.randn(2, 3, 4)
    key = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\)"):
        latent_head(mu, torch.randn(2, 3, 5), key)
    with pytest.raises(ValueError, match=r"seed .* \(2,\)"):
        latent_head(mu, mu, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"offset .* got -1"):
        latent_head(mu, mu, key, offset=-1)
    with pytest.raises(ValueError, match=r"first .* got 4294967296"):
        latent_head(mu, mu, key, first=2**32)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        latent_head(mu.long(), mu.long(), key)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_variance_may_be_of_another_dtype(name: str) -> None:
    """Under autocast exp and log give float32 beside a bfloat16 mean."""
    mu = torch.randn(2, 4, 5, 6, device=DEVICE).bfloat16().requires_grad_()
    log_variance = torch.randn(2, 4, 5, 6, device=DEVICE).requires_grad_()
    with implementation(name):
        z, kl, _ = latent_head(mu, log_variance, seed())
        grads = torch.autograd.grad(z.float().sum() + kl, [mu, log_variance])
    assert (z.dtype, grads[0].dtype, grads[1].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = mu.float() + (0.5 * log_variance).exp() * noise((2, 4, 5, 6))
    torch.testing.assert_close(z.float(), expected, rtol=2**-7, atol=1e-5)

"""Channel moments: every implementation against the float64 definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decovae_kernels import channel_moments as packed_moments
from decovae_kernels import merge_moments, moments_torch, reference
from decovae_kernels import packed as packing
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


def channel_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and scatter, taken out of the packed vector."""
    packed = packed_moments(x)
    return packing.mean_of(packed), packing.scatter_of(packed)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_values_and_gradients_equal_the_definition(name: str, case: Case) -> None:
    x = case.latent().requires_grad_()
    truth_x = x.detach().double().requires_grad_()
    truth_mean, truth_scatter = reference.channel_moments(truth_x)
    with implementation(name):
        mean, scatter = channel_moments(x)
        norms = truth_scatter.diagonal().sqrt()
        assert ((scatter - truth_scatter).abs() <= 1e-5 * norms[:, None] * norms + 1e-18).all()
        assert ((mean - truth_mean).abs() <= 1e-6 * norms + 1e-12).all()

        generator = torch.Generator().manual_seed(case.seed)
        grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in (mean, scatter)]
        (gradient,) = torch.autograd.grad([mean, scatter], [x], grads)
    (truth,) = torch.autograd.grad([truth_mean, truth_scatter], [truth_x], grads)
    assert gradient.dtype == x.dtype
    assert_gradient_close(gradient, truth)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_has_the_memory_format_of_a_dense_input(name: str, layout: str) -> None:
    x = arrange(torch.randn(2, 4, 3, 5, 7, device=DEVICE), layout).requires_grad_()
    with implementation(name):
        (gradient,) = torch.autograd.grad(channel_moments(x)[1].sum(), [x])
    assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_same_input_same_bits(name: str) -> None:
    x = torch.randn(3, 5, 7, 9, 4, device=DEVICE, requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        mean, scatter = channel_moments(x)
        return (mean, scatter, *torch.autograd.grad(scatter.square().sum() + mean.sum(), [x]))

    with implementation(name):
        assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=30, deadline=None)
@given(value=st.floats(-1e4, 1e4, width=16), seed=st.integers(0, 99))
def test_constant_channel_has_exactly_zero_scatter(name: str, value: float, seed: int) -> None:
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    x[:, 1] = value * 1.1  # not a value whose sum float32 holds exactly
    with implementation(name):
        mean, scatter = channel_moments(x)
    assert (scatter[1] == 0).all()
    assert mean[1] == x[0, 1, 0, 0].double()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_samples_show(name: str, bad: float, where: int) -> None:
    x = torch.randn(2, 3, 40, device=DEVICE)
    x[where, 1, where] = bad
    with implementation(name):
        mean, scatter = channel_moments(x)
    assert not mean[1].isfinite()
    assert not scatter[1].isfinite().any()
    assert scatter[[0, 2]][:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_autocast_does_not_lower_the_statistics(name: str) -> None:
    x = torch.randn(2, 4, 6, 6, device=DEVICE, requires_grad=True)
    with implementation(name):
        plain = channel_moments(x)[1]
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            lowered = channel_moments(x)[1]
            (gradient,) = torch.autograd.grad(lowered.square().sum(), [x])
        assert torch.equal(plain, lowered)
        assert torch.equal(gradient, torch.autograd.grad(plain.square().sum(), [x])[0])


@pytest.mark.parametrize("channels", [4, 64])
def test_a_lower_matmul_precision_does_not_lower_the_statistics(channels: int) -> None:
    x = torch.randn(2, channels, 4096, device=DEVICE)
    _, truth = reference.channel_moments(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        _, scatter = channel_moments(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ((scatter - truth).abs() <= 1e-5 * truth.diagonal().max()).all()


def test_many_samples_in_pieces() -> None:
    """Beyond one chunk, split along volumes and along space, with a background that is a different population."""
    x = torch.randn(3, 2, 1_300_000, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 0.01 + 7
    x[..., ::5] = -1
    x[0] += 100
    mean, scatter = channel_moments(x)
    truth_mean, truth_scatter = reference.channel_moments(x)
    torch.testing.assert_close(mean, truth_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(scatter, truth_scatter, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_variances_are_far_better_than_the_bound(name: str) -> None:
    """(γ − √Σ_ii)² multiplies their relative error where √Σ_ii is near γ, so 1e-5 would not do."""
    x = (torch.randn(2, 4, 24, 24, 24, generator=torch.Generator().manual_seed(0)) + 2).to(DEVICE)
    with implementation(name):
        _, scatter = channel_moments(x)
    torch.testing.assert_close(scatter.diagonal(), reference.channel_moments(x)[1].diagonal(), rtol=1e-7, atol=0)


def test_more_channels_than_triton_holds_take_the_torch_path() -> None:
    x = torch.randn(2, 65, 50, device=DEVICE)
    with implementation("triton"):
        _, scatter = channel_moments(x)
    torch.testing.assert_close(scatter, reference.channel_moments(x)[1], rtol=1e-5, atol=1e-4)


def test_gradcheck_in_float64() -> None:
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, device=DEVICE) + 5
    for layout in set(LAYOUTS) - {"expanded"}:  # overlapping memory has no numerical gradient
        assert torch.autograd.gradcheck(channel_moments, [arrange(x, layout).detach().requires_grad_()])


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0))
def test_merging_parts_equals_the_whole(sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 3, dtype=torch.float64) * 1e-3 + 1000
    merged = merge_moments(torch.stack([packed_moments(part) for part in x.split(sizes)]))
    truth_mean, truth_scatter = reference.channel_moments(x)
    assert merged[0] == sum(sizes)
    torch.testing.assert_close(packing.mean_of(merged), truth_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(packing.scatter_of(merged), truth_scatter, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        channel_moments(torch.zeros(4, 2).to(dtype))


def test_wrong_shapes_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="ndarray"):
        channel_moments(torch.zeros(4, 2).numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(7,\)"):
        channel_moments(torch.zeros(7))
    with pytest.raises(ValueError, match=r"\(7, 0\)"):
        channel_moments(torch.zeros(7, 0))


def test_unknown_implementation_is_refused_by_name() -> None:
    with implementation("cuda"), pytest.raises(ValueError, match="DECOVAE_KERNELS='cuda'"):
        channel_moments(torch.zeros(4, 2))


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("decovae_kernels._dispatch._TRITON_INSTALLED", True)
    with implementation("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        channel_moments(torch.zeros(4, 2))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decovae_kernels._dispatch._TRITON_INSTALLED", False)
    channel_moments(torch.zeros(4, 2, device=DEVICE))
    with implementation("triton"), pytest.raises(RuntimeError, match="not installed"):
        channel_moments(torch.zeros(4, 2))


def test_pieces_tile_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_torch, "_PIECE", 30)
    monkeypatch.setattr(moments_torch, "_RUN", 4)
    monkeypatch.setattr(moments_torch, "_ROW_NUMBERS", 40)
    for shape in [(5, 3, 2), (2, 3, 25), (1, 3, 1), (4, 40, 3)]:
        x = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        assert torch.autograd.gradcheck(channel_moments, [x])
        torch.testing.assert_close(channel_moments(x), reference.channel_moments(x))


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_ten_million_samples(offset: float) -> None:
    x = torch.randn(1, 2, 10_000_000, generator=torch.Generator().manual_seed(0)).add_(offset).requires_grad_()
    mean, scatter = channel_moments(x)
    truth_mean, truth_scatter = reference.channel_moments(x.detach())
    torch.testing.assert_close(mean, truth_mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(scatter.diagonal(), truth_scatter.diagonal(), rtol=1e-6, atol=0)
    assert abs(scatter[0, 1] - truth_scatter[0, 1]) <= 1e-6 * truth_scatter[0, 0]
    (gradient,) = torch.autograd.grad(scatter[0, 1], [x])
    truth = (x.detach().double() - truth_mean[:, None]).flip(1)
    assert (gradient.double() - truth).abs().max() <= 1e-6 * (1 + offset)


@pytest.mark.parametrize("shape", [(2000, 64), (3000, 3, 1), (70, 33, 2003), (1, 1, 2)])
def test_every_sample_is_counted_once(shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1).to(DEVICE)
    mean, scatter = channel_moments(x)
    truth_mean, truth_scatter = reference.channel_moments(x)
    assert packed_moments(x)[0] == x.numel() // x.shape[1]
    torch.testing.assert_close(mean, truth_mean, rtol=1e-6, atol=1e-6)
    assert (scatter - truth_scatter).abs().max() <= 1e-6 * truth_scatter.diagonal().max()

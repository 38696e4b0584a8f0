"""Group norm and SiLU in one operator, against float64."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from decovae_kernels import group_norm, reference
from tests.block_cases import assert_equal_to_reference, features, gradients, parameter, relative_error
from tests.channel_cases import DEVICE, IMPLEMENTATIONS, LAYOUTS, implementation

pytestmark = pytest.mark.device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str, *, silu: bool, shifted: bool) -> None:
    channels = shape[1]
    leaves = [features(shape, dtype, layout), parameter(channels, around=1.0), parameter(channels, seed=1)]
    if shifted:
        leaves.append(parameter(channels, seed=2))
    if dtype == torch.float64:
        leaves = [x.detach().double().requires_grad_() for x in leaves]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm(x, weight, bias, groups, 1e-6, silu=silu, shift=shift)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        return reference.group_norm(x, weight, bias, groups, 1e-6, silu=silu, shift=shift)

    assert_equal_to_reference(ours, plain, leaves)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_dtype(name: str, layout: str, dtype: torch.dtype) -> None:
    with implementation(name):
        check((2, 6, 5, 4, 7), 3, dtype, layout, silu=True, shifted=layout == "channels_last")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 3, 3, 3), 1),
        ((3, 4, 1, 1, 9), 1),
        ((1, 256, 2, 3, 2), 32),
        ((2, 96, 3, 3), 32),  # three channels a group
        ((1, 80, 11), 1),  # more channels than a tile holds
        ((4, 5, 7), 5),
        ((1, 4, 23, 21, 20), 2),  # several chunks a volume
        ((2, 8, 13, 11, 9), 4),
    ],
)
def test_every_shape(name: str, shape: tuple[int, ...], groups: int) -> None:
    # The interpreter runs a program for each channel of a contiguous tensor.
    layouts = ("channels_last",) if shape[1] > 64 else ("contiguous", "channels_last")
    with implementation(name):
        for layout in layouts:
            check(shape, groups, torch.float32, layout, silu=True, shifted=False)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_activation(name: str) -> None:
    with implementation(name):
        check((2, 6, 5, 4, 7), 3, torch.float32, "contiguous", silu=False, shifted=True)


def test_float64() -> None:
    check((2, 6, 5, 4, 7), 3, torch.float64, "contiguous", silu=True, shifted=True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_mean_of_a_thousand_deviations_costs_no_digits(name: str) -> None:
    # E[x²] − E[x]² would lose six of seven digits here.
    x, weight, bias = features((1, 4, 13, 11, 9), offset=1000.0), parameter(4, around=1.0), parameter(4, seed=1)
    with implementation(name):
        y = group_norm(x.detach().contiguous(memory_format=torch.channels_last_3d), weight, bias, 2)
    truth = reference.group_norm(x.detach().double(), weight.double(), bias.double(), 2, 1e-5)
    assert relative_error(y, truth) < 5e-5


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_input_same_bits(name: str, layout: str) -> None:
    x, weight, bias = features((2, 8, 13, 11, 9), layout=layout), parameter(8), parameter(8, seed=1)
    with implementation(name):
        runs = [gradients(group_norm(x, weight, bias, 4), [x, weight, bias]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_not_a_number_stays_one(name: str) -> None:
    x = features((2, 4, 3, 3, 3)).detach()
    x[0, 0, 0, 0, 0] = torch.nan
    with implementation(name):
        y = group_norm(x, parameter(4), parameter(4, seed=1), 2)
    assert y[0, :2].isnan().all()
    assert not y[0, 2:].isnan().any()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_empty_batch(name: str) -> None:
    x = torch.empty(0, 4, 3, 3, 3, device=DEVICE, requires_grad=True)
    weight = parameter(4)
    with implementation(name):
        y = group_norm(x, weight, parameter(4, seed=1), 2)
        found = torch.autograd.grad(y.sum(), [x, weight])
    assert y.shape == x.shape
    assert found[0].shape == x.shape
    assert not found[1].any()


def test_gradcheck() -> None:
    leaves = [features((2, 4, 3, 2, 2), torch.float64), parameter(4).double(), parameter(4, seed=1).double()]
    leaves = [x.detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, w, b, 2), leaves, fast_mode=True)


def test_wrong_input_is_named() -> None:
    x, weight = torch.randn(2, 6, 3, 3, 3), torch.ones(6)
    with pytest.raises(TypeError, match=r"floating-point features, got torch\.int64"):
        group_norm(x.long(), weight, weight, 3)
    with pytest.raises(ValueError, match="groups=4 must divide the 6 channels"):
        group_norm(x, weight, weight, 4)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        group_norm(x, weight, torch.ones(5), 3)
    with pytest.raises(ValueError, match="shift must have shape"):
        group_norm(x, weight, weight, 3, shift=torch.ones(5))
    with pytest.raises(ValueError, match=r"\(N, C, \*spatial\)"):
        group_norm(weight, weight, weight, 3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")
@pytest.mark.parametrize(("channels", "size"), [(32, 48), (64, 24), (256, 24)])
def test_one_volume_fills_a_large_gpu(monkeypatch: pytest.MonkeyPatch, channels: int, size: int) -> None:
    from decovae_kernels import group_norm_triton
    from decovae_kernels.configurations import NORM_ADD, NORM_APPLY, NORM_GRADIENT, NORM_SUMS

    monkeypatch.setattr(group_norm_triton, "multiprocessors", lambda _: 132)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.empty((1, channels, size, size, size), dtype=torch.bfloat16, memory_format=layout)
        for kernel in (NORM_ADD, NORM_APPLY, NORM_SUMS, NORM_GRADIENT):
            assert math.prod(group_norm_triton._plan(kernel, x).grid) >= 132

"""Residual blocks and normalised convolutions as operators, against float64, whole and in slabs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decovae_kernels import BlockParameters, Geometry, convolution, norm_conv, reference, residual_block
from tests.block_cases import (
    assert_equal_to_reference,
    block_parameters,
    features,
    gradients,
    parameter,
    relative_error,
)
from tests.channel_cases import IMPLEMENTATIONS, implementation

pytestmark = pytest.mark.device

EPS = (1e-6, 1e-5)


def check_block(
    shape: tuple[int, ...],
    out: int,
    groups: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    *,
    tight: bool = False,
    biases: bool = True,
) -> None:
    leaves = [features(shape, dtype, layout), *block_parameters(shape[1], out, biases=biases)]
    if dtype == torch.float64:
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in leaves]

    def ours(x: Tensor, *parameters: Any) -> Tensor:
        return residual_block(x, BlockParameters(*parameters), groups, EPS, tight=tight)[0]

    def plain(x: Tensor, *parameters: Any) -> Tensor:
        return reference.residual_block(x, parameters, groups, EPS)

    assert_equal_to_reference(ours, plain, leaves)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_of_every_layout_and_dtype(name: str, layout: str, dtype: torch.dtype) -> None:
    with implementation(name):
        check_block((2, 6, 5, 4, 7), 6, (3, 2), dtype, layout)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize(("channels", "out", "groups"), [(6, 12, (2, 4)), (1, 4, (1, 4)), (8, 8, (8, 1))])
def test_block_with_and_without_shortcut(
    name: str, tight: bool, channels: int, out: int, groups: tuple[int, int]
) -> None:
    with implementation(name):
        check_block((1, channels, 3, 5, 4), out, groups, tight=tight)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_block_of_many_channels_and_one_voxel_without_biases(name: str) -> None:
    with implementation(name):
        check_block((2, 128, 1, 1, 1), 256, (32, 32), layout="channels_last", biases=False)


def test_block_in_float64() -> None:
    check_block((2, 6, 5, 4, 7), 12, (3, 2), torch.float64)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tight_gives_the_same_bits(name: str) -> None:
    x, parameters = features((2, 6, 5, 4, 7)), block_parameters(6, 12)
    with implementation(name):
        found = [
            gradients(residual_block(x, parameters, (3, 2), EPS, tight=tight)[0], [x, *parameters])
            for tight in (False, True)
        ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_statistics_spare_the_next_norm_a_read(name: str) -> None:
    x, parameters = features((2, 6, 13, 11, 9)), block_parameters(6, 6)
    with implementation(name):
        y, statistics = residual_block(x, parameters, (3, 2), EPS)
        again = residual_block(y, parameters, (3, 2), EPS)[0]
        given = residual_block(y, parameters, (3, 2), EPS, statistics=statistics)[0]
    torch.testing.assert_close(given, again, rtol=1e-6, atol=1e-6)
    if statistics.shape[1]:
        count, mean, scatter = statistics.unbind(2)
        assert int(count[0, :, 0].sum()) == 13 * 11 * 9
        torch.testing.assert_close((count * mean).sum(1) / count.sum(1), y.mean((2, 3, 4)), rtol=1e-5, atol=1e-6)
        spread = y[:, :, None].var((2, 3, 4, 5), correction=0)
        total = (scatter + count * (mean - y.mean((2, 3, 4))[:, None]) ** 2).sum(1) / count.sum(1)
        torch.testing.assert_close(total, spread, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("planes", "layout"), [(1, "contiguous"), (2, "channels_last"), (100, "contiguous")])
def test_slabs_have_no_seams(name: str, planes: int, layout: str) -> None:
    x, parameters = features((2, 6, 5, 4, 5), layout=layout).detach(), block_parameters(6, 12)
    x[:, :, 1::2] += 5.0  # a step at every plane
    tile_bytes = (planes + 2) * 6 * 4 * 5 * 4
    norm = parameters.norm1_weight, parameters.norm1_bias, 3, 1e-6
    with implementation(name), torch.no_grad():
        whole = residual_block(x, parameters, (3, 2), EPS, tile_bytes=0)
        tiled = residual_block(x, parameters, (3, 2), EPS, tile_bytes=tile_bytes)
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
        for padding in (0, 1):
            geometry = Geometry(padding=(padding,) * 3)
            whole, tiled = (
                norm_conv(x, *norm, parameters.conv1_weight, parameters.conv1_bias, geometry=geometry, tile_bytes=size)
                for size in (0, tile_bytes)
            )
            torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


GEOMETRIES = {
    "same": (Geometry(), (3, 3, 3)),
    "temporal": (Geometry(padding=(1, 0, 0)), (3, 1, 1)),
    "strided": (Geometry(stride=(2, 2, 1), padding=(1, 1, 1)), (3, 3, 3)),
    "dilated": (Geometry(padding=(2, 0, 0), dilation=(2, 1, 1)), (3, 1, 1)),
    "grouped": (Geometry(padding=(0, 0, 0), groups=2), (1, 1, 1)),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("silu", [True, False])
def test_norm_conv(name: str, case: str, silu: bool) -> None:
    geometry, kernel = GEOMETRIES[case]
    leaves = [
        features((2, 6, 5, 4, 7)),
        parameter(6, around=1.0),
        parameter(6, seed=1),
        parameter(4, 6 // geometry.groups, *kernel),
        parameter(4, seed=2),
    ]

    def plain(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        a = reference.group_norm(x, gamma, beta, 3, 1e-6, silu=silu)
        return F.conv3d(a, weight, bias, *geometry)

    def ours(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return norm_conv(x, gamma, beta, 3, 1e-6, weight, bias, silu=silu, geometry=geometry)[0]

    with implementation(name):
        assert_equal_to_reference(ours, plain, leaves)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("stride", "padding", "far"), [(1, 1, 0), (2, 0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution(name: str, stride: int, padding: int, far: int, dtype: torch.dtype) -> None:
    geometry = Geometry((stride,) * 3, (padding,) * 3)
    leaves = [features((2, 3, 6, 4, 8), dtype), parameter(4, 3, 3, 3, 3), parameter(4, seed=1)]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (0, far) * 3), weight, bias, stride=stride, padding=padding)

    with implementation(name):
        assert_equal_to_reference(lambda *x: convolution(*x, geometry=geometry, far_padding=far)[0], plain, leaves)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_autocast_casts_the_input_and_not_the_weights(name: str) -> None:
    x, parameters = features((1, 4, 3, 4, 5)), block_parameters(4, 8)
    with implementation(name), torch.autocast(x.device.type, torch.bfloat16):
        y, _ = residual_block(x, parameters, (2, 2), EPS)
        z, _ = norm_conv(x, *parameters[:2], 2, 1e-6, parameters[2])
        w, _ = convolution(x, parameters[2])
        found = gradients(y, [x, *parameters])
    assert {y.dtype, z.dtype, w.dtype} == {torch.bfloat16}
    assert {grad.dtype for grad in found} == {torch.float32}
    truth = reference.residual_block(x.detach(), parameters, (2, 2), EPS)
    assert relative_error(y, truth) < 2e-2


def test_gradcheck() -> None:
    parameters = block_parameters(2, 4)
    leaves = [features((1, 2, 2, 3, 2), torch.float64)]
    leaves += [x.detach().double().requires_grad_() for x in parameters if x is not None]

    def block(*tensors: Tensor) -> Tensor:
        return residual_block(tensors[0], BlockParameters(*tensors[1:]), (1, 2), EPS, tight=True)[0]

    assert torch.autograd.gradcheck(block, leaves, fast_mode=True)


def test_wrong_input_is_named() -> None:
    x, p = features((1, 4, 3, 4, 5)), block_parameters(4, 8)
    with pytest.raises(TypeError, match="residual_block takes floating-point features"):
        residual_block(x.detach().long(), p, (2, 2), EPS)
    with pytest.raises(ValueError, match=r"\(N, C, D, H, W\), got \(4, 3, 4, 5\)"):
        residual_block(x[0], p, (2, 2), EPS)
    with pytest.raises(ValueError, match="at least one volume of at least one voxel"):
        residual_block(x[:0], p, (2, 2), EPS)
    with pytest.raises(ValueError, match="first norm: groups=3 must divide the 4 channels"):
        residual_block(x, p, (3, 2), EPS)
    with pytest.raises(ValueError, match="4 channels cannot be added to 8 without a shortcut"):
        residual_block(x, p._replace(shortcut_weight=None, shortcut_bias=None), (2, 2), EPS)
    with pytest.raises(ValueError, match="shortcut's weight is"):
        residual_block(x, p._replace(shortcut_weight=p.conv1_weight), (2, 2), EPS)
    with pytest.raises(ValueError, match="the first convolution's kernel is 3×3×3"):
        residual_block(x, p._replace(conv1_weight=p.conv1_weight[..., :1]), (2, 2), EPS)
    with pytest.raises(ValueError, match="a convolution of 4 channels has a weight"):
        norm_conv(x, *p[:2], 2, 1e-6, p.conv2_weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\)"):
        convolution(x, p.conv1_weight, p.norm1_bias)

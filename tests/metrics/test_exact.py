"""Measures are taken in float32, whatever their caller computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from decovae.metrics.exact import exact_arithmetic
from decovae.metrics.slice_features import NetworkKind, SliceNetwork, random_network


def test_autocast_and_gradients_are_off_inside_and_back_outside() -> None:
    with torch.autocast("cpu", torch.bfloat16), exact_arithmetic(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_tf32_is_off_inside_and_back_outside_on_a_gpu() -> None:
    before = torch.backends.cudnn.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        with exact_arithmetic(torch.device("cuda")):
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_features_are_those_of_float32_under_autocast() -> None:
    network, slices = random_network(), torch.rand(2, 1, 30, 24)
    expected = network(slices)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(slices), expected)
    assert not expected.requires_grad


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))  # sums long enough for TF32 to show
    network = SliceNetwork(NetworkKind("test", "a test", proxy=True, features=64), trunk, lambda images: images)
    slices = torch.rand(2, 1, 30, 24)
    expected = network(slices)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        found = network.cuda()(slices.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)

"""Encoding and decoding in slabs is encoding and decoding: the norms see the whole volume, and nothing shows a seam."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae_kernels import _convolution
from tests.channel_cases import DEVICE, implementation
from tests.models.twins import perturbed

pytestmark = pytest.mark.device

CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2, latent_channels=2)


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Networks and tensors are made where the kernels run."""
    with DEVICE:
        yield


def borders(shape: tuple[int, ...]) -> Tensor:
    """Steps between planes, and single bright and dark voxels, at every plane and in every corner of it."""
    x = torch.zeros(shape)
    for plane in range(shape[2]):
        x[:, :, plane] += plane // 3 % 2
        x[:, :, plane, plane % shape[3], (3 * plane) % shape[4]] += 9 * (-1) ** plane
    x[..., 0, 0] -= 3
    x[..., -1, -1] += 5
    return x


def pair(tile_bytes: int) -> tuple[Autoencoder, Autoencoder]:
    torch.manual_seed(0)
    tiled, whole = Autoencoder(CONFIG, tile_bytes=tile_bytes), Autoencoder(CONFIG, tile_bytes=0)
    perturbed(whole)
    tiled.load_state_dict(whole.state_dict())
    return tiled, whole


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor) -> None:
    share = 2e-6 if DEVICE.type == "cpu" else 2e-5  # cuDNN adds up in another order for another size
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "depth", "tile_bytes"), [("torch", 18, 1), ("torch", 18, 6000), ("torch", 18, 20000), ("triton", 6, 3000)]
)
@torch.no_grad()
def test_slabs_leave_no_seam(name: str, depth: int, tile_bytes: int) -> None:
    """From slabs of one plane to slabs of several."""
    image, latent = borders((2, 1, depth, 6, 4)), borders((2, 2, depth // 2, 4, 6))
    tiled, whole = pair(tile_bytes)
    with implementation(name):
        for mine, expected in zip(tiled.encode(image), whole.encode(image), strict=True):
            assert_equal_up_to_rounding(mine, expected)
        assert_equal_up_to_rounding(tiled.decode(latent), whole.decode(latent))


def test_slabs_are_for_where_no_gradient_is_wanted() -> None:
    tiled, whole = pair(6000)
    image = borders((1, 1, 12, 8, 6))

    def convolutions(model: Autoencoder) -> int:
        with mock.patch.object(_convolution, "convolve", side_effect=_convolution.convolve) as counted:
            model.encode(image)
        return counted.call_count

    assert convolutions(tiled) == convolutions(whole)
    with torch.no_grad():
        assert convolutions(tiled) > convolutions(whole)

"""PSNR and SSIM against scikit-image, LPIPS against the lpips package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics.reconstruction import lpips, psnr, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth volume that leaves [0, 1] on both sides, and a noisy copy."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 6, 7, 6, generator=generator)
    volume = 1.6 * torch.nn.functional.interpolate(coarse, size=(24, 28, 26), mode="trilinear") - 0.3
    return volume + 0.08 * torch.randn(volume.shape, generator=generator), volume


def as_image(volume: torch.Tensor) -> np.ndarray:
    return volume[0, 0].clamp(0, 1).double().numpy()


def test_psnr_agrees_with_scikit_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = peak_signal_noise_ratio(as_image(pair[1]), as_image(pair[0]), data_range=1)
    assert psnr(*pair) == pytest.approx(expected, abs=1e-4)
    assert psnr(pair[0][0], pair[1][0]) == psnr(*pair)


def test_ssim_agrees_with_scikit_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    # Only inside: at the borders scikit-image mirrors the image differently.
    _, map_ = structural_similarity(
        as_image(pair[1]),
        as_image(pair[0]),
        data_range=1,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim(*pair) == pytest.approx(map_[5:-5, 5:-5, 5:-5].mean(), abs=1e-4)


def test_lower_precision_around_it_does_not_touch_ssim(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    outside = ssim(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert ssim(*pair) == outside


def test_lpips_is_the_mean_over_planes_and_refuses_random_features(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = PerceptualLoss("random")
    with pytest.raises(ValueError, match="random"):
        lpips(*pair, network)
    network.calibrated = True
    first, second = (volume.clamp(0, 1) for volume in pair)
    planes = [
        network.network(first[0, 0][2::5][:, None], second[0, 0][2::5][:, None], normalize=True).mean(),
        network.network(
            first[0, 0].movedim(1, 0)[2::5][:, None], second[0, 0].movedim(1, 0)[2::5][:, None], normalize=True
        ).mean(),
        network.network(
            first[0, 0].movedim(2, 0)[2::5][:, None], second[0, 0].movedim(2, 0)[2::5][:, None], normalize=True
        ).mean(),
    ]
    assert lpips(*pair, network) == pytest.approx(float(sum(planes)) / 3, rel=1e-5)

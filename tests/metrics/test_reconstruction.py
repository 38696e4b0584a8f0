"""PSNR, SSIM and MS-SSIM against scikit-image, torchmetrics and MONAI; LPIPS against the lpips package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from scipy.ndimage import gaussian_filter
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from decovae.losses.perceptual import PerceptualLoss
from decovae.metrics.reconstruction import lpips, ms_ssim, ms_ssim_scales, psnr, ssim, ssim_and_ms_ssim
from decovae.metrics.structural import SCALE_WEIGHTS

Pair = tuple[torch.Tensor, torch.Tensor]


def make_pair(*shape: int) -> Pair:
    """A noisy copy of a smooth volume that leaves [0, 1] on both sides, and the volume: (1, 1, *shape) each."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 6, 7, 6, generator=generator)
    volume = 1.6 * F.interpolate(coarse, size=shape, mode="trilinear") - 0.3
    return volume + 0.08 * torch.randn(volume.shape, generator=generator), volume


@pytest.fixture
def pair() -> Pair:
    return make_pair(24, 29, 26)


def as_image(volume: torch.Tensor) -> np.ndarray:
    return volume[0, 0].clamp(0, 1).double().numpy()


def in_double(pair: Pair) -> Pair:
    return pair[0].clamp(0, 1).double(), pair[1].clamp(0, 1).double()


def test_psnr_agrees_with_scikit_image_and_torchmetrics_to_seven_digits(pair: Pair) -> None:
    expected = peak_signal_noise_ratio(as_image(pair[1]), as_image(pair[0]), data_range=1)
    assert psnr(*pair) == pytest.approx(expected, rel=1e-7)
    assert psnr(*pair) == pytest.approx(float(torchmetrics_psnr(*in_double(pair), data_range=1.0)), rel=1e-7)
    assert psnr(pair[0][0], pair[1][0]) == psnr(*pair)


def test_ssim_agrees_with_scikit_image_to_twelve_digits(pair: Pair) -> None:
    # Only inside, which is what scikit-image's own mean is over too.
    mean, map_ = structural_similarity(
        as_image(pair[1]),
        as_image(pair[0]),
        data_range=1,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim(*pair) == pytest.approx(map_[5:-5, 5:-5, 5:-5].mean(), rel=1e-12)
    assert ssim(*pair) == pytest.approx(mean, rel=1e-12)


def test_ssim_agrees_with_torchmetrics_to_twelve_digits_and_with_monai_to_five(pair: Pair) -> None:
    _, map_ = torchmetrics_ssim(*in_double(pair), data_range=1.0, return_full_image=True)
    assert ssim(*pair) == pytest.approx(float(map_[..., 5:-5, 5:-5, 5:-5].mean()), rel=1e-12)
    clipped = (image.clamp(0, 1) for image in pair)
    assert ssim(*pair) == pytest.approx(float(SSIMMetric(spatial_dims=3, data_range=1.0)(*clipped)), rel=1e-5)


def direct_ms_ssim(pair: Pair, weights: Sequence[float]) -> float:
    """The definition, term by published term, in float64 with SciPy's Gaussian filter."""

    def mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5, 5:-5]

    x, y = as_image(pair[0]), as_image(pair[1])
    product = 1.0
    for scale, weight in enumerate(weights, start=1):
        covariance = mean(x * y) - mean(x) * mean(y)
        variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
        term = (2 * covariance + 9e-4) / (variances + 9e-4)
        if scale == len(weights):
            term *= (2 * mean(x) * mean(y) + 1e-4) / (mean(x) ** 2 + mean(y) ** 2 + 1e-4)
        product *= float(term.mean()) ** weight
        even = tuple(slice(0, size // 2 * 2) for size in x.shape)
        x, y = (block_reduce(image[even], 2, np.mean) for image in (x, y))
    return product


@pytest.mark.parametrize(
    ("shape", "scales"), [((21, 13, 30), 1), ((23, 35, 26), 2), ((44, 49, 46), 3), ((88, 91, 95), 4)]
)
def test_ms_ssim_follows_the_definition_at_odd_shapes(shape: tuple[int, int, int], scales: int) -> None:
    pair = make_pair(*shape)
    assert ms_ssim_scales(shape) == scales
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    # Blocks of 2³ are averaged in float32.
    assert ms_ssim(*pair) == pytest.approx(direct_ms_ssim(pair, list(weights)), rel=1e-7)
    if scales == 1:
        assert ms_ssim(*pair) == pytest.approx(ssim(*pair), rel=1e-12)


def test_five_scales_take_the_published_weights() -> None:
    pair = make_pair(176, 177, 176)
    assert ms_ssim(*pair) == pytest.approx(direct_ms_ssim(pair, SCALE_WEIGHTS), rel=1e-7)


def test_ms_ssim_agrees_with_monai_to_five_digits() -> None:
    # MONAI and torchmetrics want (scales − 1)² · 11 voxels, where 2^(scales − 1) · 11 suffice. The same for three.
    pair = make_pair(46, 48, 47)
    weights = [weight / sum(SCALE_WEIGHTS[:3]) for weight in SCALE_WEIGHTS[:3]]
    metric = MultiScaleSSIMMetric(spatial_dims=3, data_range=1.0, kernel_size=11, weights=weights)
    assert ms_ssim(*pair) == pytest.approx(float(metric(*(image.clamp(0, 1) for image in pair))), rel=1e-5)


def test_five_scales_where_they_fit() -> None:
    shapes = [(176, 180, 200), (175, 256, 256), (128, 256, 128), (64, 72, 64), (32, 36, 32), (11, 500, 500)]
    assert [ms_ssim_scales(shape) for shape in shapes] == [5, 4, 4, 3, 2, 1]
    with pytest.raises(ValueError, match="11 voxels"):
        ms_ssim_scales((10, 64, 64))


def test_one_pass_gives_both(pair: Pair) -> None:
    assert ssim_and_ms_ssim(*pair) == (ssim(*pair), ms_ssim(*pair))


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_equal_volumes_are_perfectly_similar(pair: Pair, level: float) -> None:
    constant = torch.full_like(pair[1], level)
    for volume in (pair[1], constant):
        assert ssim(volume, volume) == pytest.approx(1, abs=1e-15)
        assert ms_ssim(volume, volume) == pytest.approx(1, abs=1e-15)
        assert psnr(volume, volume) == math.inf


def test_constants_have_the_similarity_of_their_luminance() -> None:
    shape = (1, 1, 24, 22, 25)
    for x, y in ((0.0, 1.0), (0.3, 0.9), (0.98, 1.0)):
        luminance = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
        first, second = torch.full(shape, x), torch.full(shape, y)
        # The contrasts of constants are 1; 1e-7 is how near float32 comes to 0.3.
        assert ssim(first, second) == pytest.approx(luminance, rel=2e-7)
        weight = SCALE_WEIGHTS[1] / sum(SCALE_WEIGHTS[:2])
        assert ms_ssim(first, second) == pytest.approx(luminance**weight, rel=2e-7)
        assert psnr(first, second) == pytest.approx(-20 * math.log10(y - x), rel=1e-6)


def test_opposite_contrast_has_no_multi_scale_similarity(pair: Pair) -> None:
    volume = torch.rand(1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(1))
    assert ssim(volume, 1 - volume) < 0
    assert ms_ssim(volume, 1 - volume) == 0


def test_lower_precision_around_it_changes_nothing(pair: Pair, lpips_network: PerceptualLoss) -> None:
    outside = (psnr(*pair), *ssim_and_ms_ssim(*pair), lpips(*pair, lpips_network))
    with torch.autocast("cpu", torch.bfloat16):
        assert (psnr(*pair), *ssim_and_ms_ssim(*pair), lpips(*pair, lpips_network)) == outside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_measured_as_what_it_holds(pair: Pair, dtype: torch.dtype) -> None:
    reconstruction = pair[0].to(dtype)
    for measure in (psnr, ssim, ms_ssim):
        assert measure(reconstruction, pair[1]) == measure(reconstruction.float(), pair[1])


def test_gradients_are_not_recorded_and_inputs_not_changed(pair: Pair) -> None:
    reconstruction, kept = pair[0].clamp(0, 1).requires_grad_(), pair[0].clamp(0, 1)
    for measure in (psnr, ssim, ms_ssim):
        assert isinstance(measure(reconstruction, pair[1]), float)
    assert torch.equal(reconstruction.detach(), kept)


def test_any_strides_give_the_same(pair: Pair) -> None:
    turned = tuple(image.transpose(2, 4).contiguous().transpose(2, 4) for image in pair)
    assert (psnr(*turned), ms_ssim(*turned)) == pytest.approx((psnr(*pair), ms_ssim(*pair)), rel=1e-13)


@pytest.mark.parametrize("voxels", [1, 2000, 10**6])
def test_slabs_add_up_to_the_volume(pair: Pair, voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ssim_and_ms_ssim(*pair)
    monkeypatch.setattr("decovae.metrics.structural.CPU_SLAB", voxels)
    assert ssim_and_ms_ssim(*pair) == pytest.approx(whole, rel=1e-13)


def test_a_nan_is_never_a_number(pair: Pair, lpips_network: PerceptualLoss) -> None:
    pair[0][0, 0, 12, 12, 12] = math.nan
    assert all(math.isnan(measure(*pair)) for measure in (psnr, ssim, ms_ssim))
    assert math.isnan(lpips(*pair, lpips_network))  # in the slice 12 that it sees


def test_what_is_no_pair_of_volumes_is_refused(pair: Pair) -> None:
    for measure in (psnr, ssim, ms_ssim):
        for first, second in (
            (pair[0], pair[1][..., 1:]),
            (pair[0].expand(2, 1, -1, -1, -1), pair[1].expand(2, 1, -1, -1, -1)),
            (pair[0][0, 0], pair[1][0, 0]),
        ):
            with pytest.raises(ValueError, match="one shape"):
                measure(first, second)
    with pytest.raises(ValueError, match="11"):
        ssim(pair[0][:, :, :10], pair[1][:, :, :10])


@pytest.fixture(scope="module")
def lpips_network(tmp_path_factory: pytest.TempPathFactory) -> PerceptualLoss:
    """The published heads on a fixed SqueezeNet that needs no download."""
    from torchvision.models import squeezenet1_1

    file: Path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.save(squeezenet1_1(weights=None).state_dict(), file)
    return PerceptualLoss(str(file))


@pytest.mark.parametrize("pixels", [1, 2000, 2**20])
def test_lpips_is_the_package_s_mean_over_planes_to_six_digits(
    pair: Pair, lpips_network: PerceptualLoss, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpips import LPIPS

    package = LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    package.load_state_dict(lpips_network.network.state_dict())
    monkeypatch.setattr("decovae.metrics.reconstruction.CPU_PIXELS", pixels)
    first, second = (2 * volume[0, 0].clamp(0, 1).double() - 1 for volume in pair)
    package.double()
    planes = [
        np.mean(
            [
                package(first.select(axis, index)[None, None], second.select(axis, index)[None, None]).item()
                for index in range(2, first.shape[axis], 5)
            ]
        )
        for axis in range(3)
    ]
    assert lpips(*pair, lpips_network) == pytest.approx(np.mean(planes), rel=1e-6)


def test_lpips_sees_the_slices_it_is_asked_for(pair: Pair, lpips_network: PerceptualLoss) -> None:
    reconstruction = pair[1].clone()
    reconstruction[0, 0, 10] += 0.2
    assert lpips(reconstruction, pair[1], lpips_network, every=1) > 0
    equal_planes = pair[1].clone()
    assert lpips(equal_planes, pair[1], lpips_network) == 0
    with pytest.raises(ValueError, match="without a slice"):
        lpips(*pair, lpips_network, every=60)


def test_lpips_refuses_random_features(pair: Pair) -> None:
    with pytest.raises(ValueError, match="random"):
        lpips(*pair, PerceptualLoss("random"))

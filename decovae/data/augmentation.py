"""The reference's augmentation, on patches instead of whole volumes, by MONAI's transforms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from decovae.data.volumes import Shape

if TYPE_CHECKING:
    from monai.transforms import Compose


@dataclass(frozen=True)
class AugmentationConfig:
    """Probability and strength of each transform, in the order of application; intensities are scaled ones."""

    bias_field_probability: float = 0.3
    bias_field_coefficients: tuple[float, float] = (0.0, 0.3)
    """Of the polynomial of degree 3 whose exponential multiplies the patch."""
    gibbs_probability: float = 0.3
    gibbs_alpha: tuple[float, float] = (0.5, 1.0)
    """Share of the radius in k-space that is cut off."""
    contrast_probability: float = 0.3
    contrast_gamma: tuple[float, float] = (0.5, 2.0)
    histogram_shift_probability: float = 0.05
    histogram_shift_points: int = 10
    """Control points of the piecewise linear map of intensities."""
    intensity_scale_probability: float = 0.3
    intensity_scale: float = 0.1
    """Intensities are multiplied by 1 − this to 1 + this."""
    intensity_shift_probability: float = 0.3
    intensity_shift: float = 0.05
    """Up to this is added or subtracted."""
    flip_probability: float = 0.5
    """Of each axis."""
    turn_probability: float = 0.5
    """Of each plane, by 90, 180 or 270 degrees."""


class Augmentation:
    """Applies `config` to patches of one shape.

    Planes whose two sides differ are not turned: a quarter turn would change the patch's shape.
    """

    def __init__(self, config: AugmentationConfig, patch: Shape) -> None:
        self._transforms = _transforms(config, patch)

    def __call__(self, image: torch.Tensor, *, seed: int) -> torch.Tensor:
        """The augmented `image`, `(1, *patch)`, float32; equal for equal `image` and `seed` (below 2³²)."""
        if image.amin() == image.amax():
            return image  # air: nothing to see from any side, and MONAI's histogram shift would warn of it
        self._transforms.set_random_state(seed=seed)
        augmented = self._transforms(image)
        return augmented.as_tensor().to(torch.float32).contiguous()


def _transforms(config: AugmentationConfig, patch: Shape) -> Compose:
    from monai import transforms as mt  # here, not above: it takes seconds, and unaugmented runs need none of it

    square = [plane for plane in combinations(range(3), 2) if patch[plane[0]] == patch[plane[1]]]
    return mt.Compose(
        [
            mt.RandBiasField(prob=config.bias_field_probability, coeff_range=config.bias_field_coefficients),
            mt.RandGibbsNoise(prob=config.gibbs_probability, alpha=config.gibbs_alpha),
            mt.RandAdjustContrast(prob=config.contrast_probability, gamma=config.contrast_gamma),
            mt.RandHistogramShift(
                prob=config.histogram_shift_probability, num_control_points=config.histogram_shift_points
            ),
            mt.RandScaleIntensity(prob=config.intensity_scale_probability, factors=config.intensity_scale),
            mt.RandShiftIntensity(prob=config.intensity_shift_probability, offsets=config.intensity_shift),
            *(mt.RandFlip(prob=config.flip_probability, spatial_axis=axis) for axis in range(3)),
            *(mt.RandRotate90(prob=config.turn_probability, spatial_axes=plane) for plane in square),
        ]
    )

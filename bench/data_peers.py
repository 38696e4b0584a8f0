"""MONAI's ways from files to patches: the reference's chain of transforms, and its PersistentDataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from decovae.data.augmentation import AugmentationConfig
from decovae.data.volumes import Shape

KEY = "image"


def loading(grid: Shape) -> list[Any]:
    """From a file to a volume in RAS axes, resized."""
    from monai import transforms as mt

    return [
        mt.LoadImaged(KEY),
        mt.EnsureChannelFirstd(KEY),
        mt.Orientationd(KEY, axcodes="RAS", labels=None),
        mt.Resized(KEY, spatial_size=grid, mode="trilinear"),
    ]


def scaling() -> list[Any]:
    """Percentiles 0 and 99.5 to 0 and 1, unclipped."""
    from monai import transforms as mt

    return [mt.ScaleIntensityRangePercentilesd(KEY, 0, 99.5, 0, 1, clip=False)]


def augmentation(config: AugmentationConfig) -> list[Any]:
    """The reference's random transforms, of whatever shape they are given."""
    from monai import transforms as mt

    return [
        mt.RandBiasFieldd(KEY, prob=config.bias_field_probability, coeff_range=config.bias_field_coefficients),
        mt.RandGibbsNoised(KEY, prob=config.gibbs_probability, alpha=config.gibbs_alpha),
        mt.RandAdjustContrastd(KEY, prob=config.contrast_probability, gamma=config.contrast_gamma),
        mt.RandHistogramShiftd(
            KEY, prob=config.histogram_shift_probability, num_control_points=config.histogram_shift_points
        ),
        mt.RandScaleIntensityd(KEY, prob=config.intensity_scale_probability, factors=config.intensity_scale),
        mt.RandShiftIntensityd(KEY, prob=config.intensity_shift_probability, offsets=config.intensity_shift),
        *(mt.RandFlipd(KEY, prob=config.flip_probability, spatial_axis=axis) for axis in range(3)),
        *(
            mt.RandRotate90d(KEY, prob=config.turn_probability, spatial_axes=plane)
            for plane in combinations(range(3), 2)
        ),
    ]


def cropping(patch: Shape) -> list[Any]:
    """A patch from anywhere."""
    from monai import transforms as mt

    return [mt.RandSpatialCropd(KEY, roi_size=patch, random_size=False)]


def monai_dataset(files: Sequence[Path], transforms: Sequence[Any], cache: Path | None) -> Any:
    """A dataset of files, a PersistentDataset where a folder for its cache is given.

    That keeps what comes before the first random transform, as plain tensors, which is its default and its fastest.
    """
    from monai.data import Dataset, PersistentDataset
    from monai.transforms import Compose

    data = [{KEY: str(file)} for file in files]
    chain = Compose(list(transforms))
    return Dataset(data, chain) if cache is None else PersistentDataset(data, chain, cache_dir=cache)


def monai_batches(dataset: Any, order: Sequence[int], *, size: int, workers: int) -> Iterable[Any]:
    """Batches from worker processes, by MONAI's DataLoader, which gives each worker random numbers of its own."""
    from monai.data import DataLoader

    return DataLoader(dataset, batch_size=size, sampler=order, num_workers=workers)

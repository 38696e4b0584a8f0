"""Are generated volumes copies of training volumes? Nearest neighbours, held against those of held-out subjects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

THUMBNAIL_VOXELS = 4096
"""Blocks of a thumbnail at most: anatomy that tells subjects apart, without noise, which no copy would share."""

SPACE = (
    f"root mean square difference between volumes averaged to at most {THUMBNAIL_VOXELS:,} blocks, intensities 0 to 1"
)
"""What the distances of :func:`memorisation` between thumbnails are, for people."""

QUANTILE = 0.05
"""Of the held-out subjects' distances: one near twin among them does not hide copies."""

NEARER = 0.75
"""A sample is suspicious below this share of that quantile. On the template cohort 80 fresh brains, drawn or generated,
lie at 0.98 of it or farther, and reconstructions of training volumes, copies as decoders make them, at 0.36 to 0.67."""

_ROWS = 1024


@dataclass(frozen=True)
class Memorisation:
    """Distances of generated samples and of held-out subjects to the training volumes nearest to them.

    Attributes:
        samples: a distance for each sample.
        nearest: which training volume that is, for each sample.
        held_out: a distance for each held-out subject.
        threshold: distance below which a sample is suspicious: `NEARER` times the `QUANTILE` of `held_out`.
        suspicious: places of those samples. To be looked at: a distance proves no copy.
        ratio: median of `samples` over median of `held_out`; near 1 where samples are as new as new subjects, None
            where most of the held-out ones are copies themselves.
    """

    samples: list[float]
    nearest: list[int]
    held_out: list[float]
    threshold: float
    suspicious: list[int]
    ratio: float | None


def thumbnail(volume: Tensor) -> Tensor:
    """A volume averaged over blocks, as near cubes as they can be, to at most `THUMBNAIL_VOXELS` values (F,), float32.

    Args:
        volume: (1, D, H, W) or (D, H, W), any float dtype.

    Raises:
        TypeError: the volume is not floating-point.
        ValueError: the volume has another shape.
    """
    if not volume.is_floating_point():
        raise TypeError(f"volume must be floating-point, not {volume.dtype}")
    if volume.ndim == 3:
        volume = volume[None]
    if volume.ndim != 4 or len(volume) != 1 or volume.numel() == 0:
        raise ValueError(f"volume must be (1, D, H, W) or (D, H, W), not {tuple(volume.shape)}")
    edge = max((volume.numel() / THUMBNAIL_VOXELS) ** (1 / 3), 1.0)
    size = _blocks(volume, edge)
    while math.prod(size) > THUMBNAIL_VOXELS:  # an axis is shorter than a block
        edge *= 1.01
        size = _blocks(volume, edge)
    return torch.nn.functional.adaptive_avg_pool3d(volume.detach().float(), size).flatten()


def nearest_training(train: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (M,), float64, of each query to the nearest training volume, and that one's place (M,), int64.

    Args:
        train: (N, F), any float dtype, N at least 1.
        queries: (M, F), on the same device, M at least 1.

    Raises:
        TypeError: the features are not floating-point.
        ValueError: a set is empty, the sets differ in F, or features are not finite.
    """
    for features in (train, queries):
        if not features.is_floating_point():
            raise TypeError(f"features must be floating-point, not {features.dtype}")
        if features.ndim != 2 or features.numel() == 0 or features.shape[1] != train.shape[-1]:
            raise ValueError(f"features must be (N, F) and (M, F), not {tuple(train.shape)} and {tuple(queries.shape)}")
        if not features.isfinite().all():
            raise ValueError("features must be finite")
    found = [_nearest(train.detach(), rows.double()) for rows in queries.detach().split(_ROWS)]
    places = torch.cat(found)
    # Not from the expanded square, whose rounding would keep the distance of an exact copy from being zero.
    distances = [
        (train[chosen].double() - rows.double()).norm(dim=1)
        for chosen, rows in zip(found, queries.detach().split(_ROWS), strict=True)
    ]
    return torch.cat(distances), places


def memorisation(train: Tensor, held_out: Tensor, samples: Tensor) -> Memorisation:
    """Whether samples are nearer to training volumes than volumes that nobody trained on are.

    Distances are divided by √F, so that those of thumbnails are root mean square differences of intensity (`SPACE`).

    Args:
        train: (N, F), the training volumes' thumbnails, or any features, N at least 1.
        held_out: (H, F), those of subjects that are not among them, H at least 1.
        samples: (M, F), those of generated volumes, M at least 1.

    Raises:
        TypeError, ValueError: as for :func:`nearest_training`.
    """
    width = train.shape[-1] ** 0.5
    reference = nearest_training(train, held_out)[0] / width
    distances, places = nearest_training(train, samples)
    distances = distances / width
    threshold = NEARER * float(reference.quantile(QUANTILE))
    middle = float(reference.quantile(0.5))
    return Memorisation(
        samples=distances.tolist(),
        nearest=places.tolist(),
        held_out=reference.tolist(),
        threshold=threshold,
        suspicious=torch.nonzero(distances < threshold).flatten().tolist(),
        ratio=float(distances.quantile(0.5)) / middle if middle > 0 else None,
    )


def _blocks(volume: Tensor, edge: float) -> tuple[int, int, int]:
    depth, height, width = (max(int(length / edge), 1) for length in volume.shape[1:])
    return depth, height, width


def _nearest(train: Tensor, rows: Tensor) -> Tensor:
    """Place of the nearest training volume of each row, (rows,); the first of equally near ones."""
    least = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=rows.device)
    places = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for start in range(0, len(train), _ROWS):
        block = train[start : start + _ROWS].double()
        # Without the rows' own norms, which are the same for every training volume.
        partial, place = (block.square().sum(1) - 2 * rows @ block.T).min(dim=1)
        places = torch.where(partial < least, start + place, places)
        least = torch.minimum(partial, least)
    return places

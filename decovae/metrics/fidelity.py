"""Do generated samples look real, and are all the real ones among them? Measures between two sets of features.

Duplicates count as they are: slices without a brain have one and the same features, whose neighbours lie at distance
zero. Give slices that show something.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512
"""Rows of a distance matrix that are held at once."""

RESOLUTION = 1e-12
"""Squared distance, over the squared norms of its ends, that is rounding of float32 features: it counts as zero."""


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 2019), 0 to 1.

    Attributes:
        precision: share of generated samples in the estimated manifold of the real ones.
        recall: share of real samples in the estimated manifold of the generated ones.
    """

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Density and coverage (Naeem et al., 2020).

    Attributes:
        density: how many neighbourhoods of real samples a generated one lies in, over k; 1 is expected of samples of
            the same distribution, and it may exceed 1.
        coverage: share of real samples with a generated one in their neighbourhood, 0 to 1.
    """

    density: float
    coverage: float


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: a set's manifold is the balls to each sample's k-th nearest other sample.

    Args:
        real: features (N, F), any float dtype.
        generated: features (M, F) on the same device.
        k: which neighbour.

    Raises:
        TypeError: the features are not floating-point.
        ValueError: k is below 1, a set has no more than k samples, the sets differ in F, or features are not finite.
    """
    real, generated = _prepared(real, generated, least=k + 1, k=k)
    inside_real, inside_generated = _radii(real, k), _radii(generated, k)
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled = []
    for rows, distances in _squared_distances(real, generated):
        precise |= _inside(distances, inside_real[rows, None]).any(0)
        recalled.append(_inside(distances, inside_generated).any(1))
    return PrecisionRecall(float(precise.double().mean()), float(torch.cat(recalled).double().mean()))


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> DensityCoverage:
    """Density and coverage: a real sample's neighbourhood is the ball to its k-th nearest other real sample.

    Args:
        real: features (N, F), any float dtype.
        generated: features (M, F) on the same device.
        k: which neighbour.

    Raises:
        TypeError: the features are not floating-point.
        ValueError: k is below 1, there are no more than k real samples or no generated one, the sets differ in F, or
            features are not finite.
    """
    real, generated = _prepared(real, generated, least=1, k=k)
    if len(real) <= k:
        raise ValueError(f"neighbour {k} needs more than {k} samples, got {len(real)}")
    radii = _radii(real, k)
    counts = torch.cat([_inside(each, radii[rows, None]).sum(1) for rows, each in _squared_distances(real, generated)])
    density = float(counts.sum()) / (k * len(generated))
    return DensityCoverage(density, float((counts > 0).double().mean()))


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Kernel inception distance (Bińkowski et al., 2018): unbiased squared MMD with the kernel (xᵀy / F + 1)³.

    Of all samples at once, so it is deterministic; unbiased, it may be slightly negative. Published figures are often
    a mean over subsets, whose expectation is the same, times 100 or 1,000.

    Args:
        real: features (N, F), any float dtype, N at least 2.
        generated: features (M, F) on the same device, M at least 2.

    Raises:
        TypeError: the features are not floating-point.
        ValueError: a set has fewer than 2 samples, the sets differ in F, or features are not finite.
    """
    real, generated = _prepared(real, generated, least=2)
    crossed = sum(float(_kernel(rows, generated).sum()) for rows in real.split(ROWS))
    return _between_different(real) + _between_different(generated) - 2 * crossed / (len(real) * len(generated))


def _prepared(real: Tensor, generated: Tensor, *, least: int, k: int = 1) -> tuple[Tensor, Tensor]:
    for features in (real, generated):
        if not features.is_floating_point():
            raise TypeError(f"features must be floating-point, not {features.dtype}")
        if features.ndim != 2 or features.shape[1] != real.shape[-1]:
            raise ValueError(
                f"features must be (N, F) and (M, F), not {tuple(real.shape)} and {tuple(generated.shape)}"
            )
        if len(features) < least:
            raise ValueError(f"at least {least} samples are needed of each set, got {len(features)}")
        if not features.isfinite().all():
            raise ValueError("features must be finite")
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return real.detach().double(), generated.detach().double()


def _squared_distances(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of the matrix of squared distances, float64, with the rows that they are of."""
    column_norms = columns.square().sum(1)
    for start in range(0, len(rows), ROWS):
        block = rows[start : start + ROWS]
        norms = block.square().sum(1)[:, None] + column_norms
        squared = norms - 2 * block @ columns.T
        yield slice(start, start + len(block)), squared.masked_fill(squared <= RESOLUTION * norms, 0)


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance of each sample to its k-th nearest other sample, (N,)."""
    radii = []
    for rows, squared in _squared_distances(features, features):
        places = torch.arange(rows.start, rows.stop, device=features.device)
        squared[places - rows.start, places] = torch.inf
        radii.append(squared.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _inside(squared: Tensor, radii: Tensor) -> Tensor:
    """Whether samples lie in balls: nearer to the centre than the radius, or on the centre, whatever the radius."""
    return (squared < radii) | (squared == 0)


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _between_different(features: Tensor) -> float:
    """Mean kernel between two different samples of a set."""
    count = len(features)
    total = sum(float(_kernel(rows, features).sum()) for rows in features.split(ROWS))
    own = float(((features.square().sum(1) / features.shape[1] + 1) ** 3).sum())
    return (total - own) / (count * (count - 1))

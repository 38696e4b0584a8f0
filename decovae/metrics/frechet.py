"""Fréchet distance between two sets of features (Heusel et al., 2017), from moments that are gathered batch by batch.

real = feature_moments(first)
for batch in rest:
    real = real.merge(feature_moments(batch))
distance = frechet_distance(real, generated)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and scatter of F features over a set of samples; memory does not depend on how many there are.

    Attributes:
        count: number of samples n.
        mean: (F,), float64, on the features' device.
        scatter: Σ_s (x_s − mean)(x_s − mean)ᵀ, (F, F), float64, on the same device.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def features(self) -> int:
        """Number of features F."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance Σ = scatter / (n − 1), (F, F), float64.

        Raises:
            ValueError: there is one sample.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of both sets of samples together (Chan et al., 1979), on this set's device.

        Raises:
            ValueError: the sets differ in their number of features.
        """
        _refuse_other_features(self, other)
        other = other.to(self.mean.device)
        count = self.count + other.count
        shift = other.mean - self.mean
        return FeatureMoments(
            count,
            self.mean + shift * (other.count / count),
            self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count),
        )

    def to(self, device: torch.device | str) -> FeatureMoments:
        """The same numbers on another device."""
        return FeatureMoments(self.count, self.mean.to(device), self.scatter.to(device))


def feature_moments(features: Tensor) -> FeatureMoments:
    """Moments of `features`, (N, F), any float dtype, N at least 1, in float64 on their device.

    Non-finite features give non-finite moments.

    Raises:
        TypeError: `features` is not a floating-point tensor.
        ValueError: `features` is not (N, F), or holds no sample.
    """
    if not features.is_floating_point():
        raise TypeError(f"features must be floating-point, not {features.dtype}")
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features must be (N, F) with at least one sample, not {tuple(features.shape)}")
    samples = features.detach().double()
    mean = samples.mean(0)
    centred = samples - mean
    return FeatureMoments(len(samples), mean, centred.T @ centred)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), the squared 2-Wasserstein distance of two Gaussians, at least 0.

    The last trace is the sum of the singular values of AᵀB for any A Aᵀ = Σ_a and B Bᵀ = Σ_b. So it needs no square
    root of a product that is not symmetric, loses no digits to it, and holds for singular covariances, as those of
    fewer samples than features are. NaN where a moment is not finite.

    Raises:
        ValueError: a set has fewer than 2 samples, or the sets differ in their number of features.
    """
    _refuse_other_features(a, b)
    b = b.to(a.mean.device)
    first, second = a.covariance, b.covariance
    shift = a.mean - b.mean
    if not all(bool(each.isfinite().all()) for each in (first, second, shift)):  # the eigensolver refuses them
        return float("nan")
    overlap = torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum()
    return max(float(shift @ shift + first.trace() + second.trace() - 2 * overlap), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """A with A Aᵀ = Σ, (F, rank). Directions of no variance are left out: their rounding would show as its root."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    resolved = eigenvalues > len(eigenvalues) * torch.finfo(torch.float64).eps * eigenvalues[-1]
    factor: Tensor = eigenvectors[:, resolved] * eigenvalues[resolved].sqrt()
    return factor


def _refuse_other_features(a: FeatureMoments, b: FeatureMoments) -> None:
    if a.features != b.features:
        raise ValueError(f"sets of {a.features} and of {b.features} features cannot be compared")

"""Distributions whose flow is known: their velocity, the map that it integrates to, and a network that may learn it.

x_t = (1 − t) x₀ + t x₁ with x₀ ~ N(0, 1); everything here is float64, voxel by voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from decovae.generation.flow_matching import flow_matching_loss


class Mixture:
    """Σ w N(m, s²), of numbers; one component is a Gaussian."""

    def __init__(self, weights: list[float], means: list[float], stds: list[float]) -> None:
        self.weights, self.means, self.stds = (torch.tensor(x, dtype=torch.float64) for x in (weights, means, stds))

    @property
    def mean(self) -> float:
        return float((self.weights * self.means).sum())

    @property
    def variance(self) -> float:
        return float((self.weights * (self.stds**2 + self.means**2)).sum()) - self.mean**2

    @property
    def kurtosis(self) -> float:
        """E(x − mean)⁴ / variance²."""
        off = self.means - self.mean
        fourth = self.weights * (off**4 + 6 * off**2 * self.stds**2 + 3 * self.stds**4)
        return float(fourth.sum()) / self.variance**2

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        component = torch.multinomial(self.weights, math.prod(shape), replacement=True, generator=generator)
        noise = torch.randn(math.prod(shape), dtype=torch.float64, generator=generator)
        return (self.means[component] + self.stds[component] * noise).view(shape)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x₁ − x₀ | x_t = x]: each component's regression, weighted by how likely it is; t broadcasts to x."""
        off, variance, density = self._components(x, t)
        t = t[..., None]
        slope = (t * self.stds**2 - (1 - t)) / variance
        return ((density / density.sum(-1, keepdim=True)) * (self.means + slope * off)).sum(-1)

    def density(self, x: Tensor, t: Tensor) -> Tensor:
        """Of x_t."""
        return self._components(x, t)[2].sum(-1)

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = t[..., None]
        variance = (1 - t) ** 2 + t**2 * self.stds**2
        off = x[..., None] - t * self.means
        return off, variance, self.weights * (-(off**2) / (2 * variance)).exp() / (2 * math.pi * variance).sqrt()

    def share(self, x: Tensor, t: Tensor) -> Tensor:
        """How much of x_t lies below x."""
        scale = ((1 - t) ** 2 + t**2 * self.stds**2).sqrt()
        return (self.weights * torch.special.ndtr((x[..., None] - t * self.means) / scale)).sum(-1)

    def quantile(self, share: Tensor) -> Tensor:
        """The value below which that share of x₁ lies, by bisection. In one dimension a flow keeps shares, so this is
        where the exact solution ends that starts at the same share of the noise."""
        low, high = torch.full_like(share, -20), torch.full_like(share, 20)
        for _ in range(64):
            middle = (low + high) / 2
            below = self.share(middle, torch.ones((), dtype=torch.float64)) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def end(self, noise: Tensor) -> Tensor:
        """The exact solution at t = 1 from `noise` at t = 0."""
        return self.quantile(torch.special.ndtr(noise))


class Gaussian:
    """N(m, Σ) of vectors along the second axis: latents (N, C, d, h, w), the same at every voxel."""

    def __init__(self, mean: list[float], covariance: list[list[float]]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.covariance = torch.tensor(covariance, dtype=torch.float64)
        values, self.axes = torch.linalg.eigh(self.covariance)
        self.stds = values.sqrt()
        self.root = self.axes @ self.stds.diag() @ self.axes.T

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """m + (tΣ − (1−t)) ((1−t)² + t²Σ)⁻¹ (x − tm) of x (N, C, …) and t (N,)."""
        t = t.view(-1, 1)
        gain = (t * self.stds**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.stds**2)
        t, gain = t.view(-1, *[1] * (x.ndim - 1)), gain.view(len(gain), -1, *[1] * (x.ndim - 2))
        off = _mix(self.axes.T, x - t * _along(self.mean, x))
        return _along(self.mean, x) + _mix(self.axes, gain * off)

    def end(self, noise: Tensor) -> Tensor:
        """The exact solution at t = 1: m + √Σ x₀. Also how to draw samples."""
        return _along(self.mean, noise) + _mix(self.root, noise)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,nj...->ni...", matrix, x)


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (x.ndim - 2))


class Voxelwise(nn.Module):
    """A velocity (N, C, d, h, w) from each voxel's channels and the time."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, channels)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype).expand(x.shape[0])
        times = torch.stack((t, (math.pi * t).cos(), (2 * math.pi * t).cos()), dim=1)
        times = times[:, None, None, None].expand(-1, *x.shape[2:], -1)
        out: Tensor = self.layers(torch.cat((x.movedim(1, -1), times), dim=-1)).movedim(-1, 1)
        return out


def train(
    network: nn.Module,
    draw: Callable[[torch.Generator], Tensor],
    draw_times: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    seed: int = 0,
) -> None:
    """Train by this project's loss on fresh data, noise and times, to a learning rate of zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        data = draw(generator).float()
        noise = torch.randn(data.shape, generator=generator)
        optimizer.zero_grad()
        flow_matching_loss(network, data, noise, draw_times(len(data), generator)).mean().backward()
        optimizer.step()
        schedule.step()

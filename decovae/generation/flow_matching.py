"""Conditional flow matching on the straight path from noise to data, and MONAI's rectified-flow times.

Time t runs from 0, noise x₀ ~ N(0, I), to 1, data x₁; x_t = (1 − t) x₀ + t x₁ moves with the velocity x₁ − x₀.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Norm: TypeAlias = Literal["l2", "l1"]


@dataclass(frozen=True)
class TimeSchedule:
    """Where on the path a flow is trained and its solver steps: more often near noise, the larger the volume.

    The noise level s = 1 − t becomes r s / (1 + (r − 1) s), r = scale · (voxels / base_voxels)^⅓: MONAI's
    `timestep_transform`. Voxels are those of a latent.

    Attributes:
        scale: factor on r.
        base_voxels: voxels at which r = scale.
        distribution: of the noise level before the transform.

    Raises:
        ValueError: on construction, if scale or base_voxels is not positive or the distribution unknown.
    """

    scale: float = 1.4
    base_voxels: int = 32**3
    distribution: Literal["uniform"] = "uniform"

    def __post_init__(self) -> None:
        if not self.scale > 0 or self.base_voxels < 1 or self.distribution != "uniform":
            raise ValueError(
                f"a time schedule has a positive scale and base_voxels and the distribution 'uniform', not {self}"
            )

    def draw(self, uniforms: Tensor, voxels: int) -> Tensor:
        """Random times to train at, (N,) float32 in [0, 1], of N numbers drawn evenly from [0, 1), float64."""
        return self._times(uniforms, voxels).float()

    def times(self, steps: int, voxels: int) -> Tensor:
        """The ends of a solver's steps, (steps + 1,) float64 on the CPU, ascending, 0 and 1 exactly at the ends.

        Raises:
            ValueError: steps < 1.
        """
        if steps < 1:
            raise ValueError(f"a solver takes at least one step, not {steps}")
        times = self._times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), voxels)
        times[0], times[-1] = 0, 1
        return times

    def quantiles(self, count: int, voxels: int) -> Tensor:
        """Fixed times that stand for the random ones, (count,) float32 on the CPU, ascending.

        They are the distribution's quantiles at (i + ½) / count, so that a validation loss has no noise from its times.
        """
        levels = (count - 0.5 - torch.arange(count, dtype=torch.float64)) / max(count, 1)
        return self._times(levels, voxels).float()

    def _times(self, levels: Tensor, voxels: int) -> Tensor:
        """Times of uniform noise levels."""
        from monai.networks.schedulers.rectified_flow import timestep_transform

        transformed: Tensor = timestep_transform(
            1000 * levels, voxels, self.base_voxels, scale=self.scale, num_train_timesteps=1000, spatial_dim=3
        )
        return (1 - transformed / 1000).clamp(0, 1)


def bridge(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t) x₀ + t x₁ of noise x₀ and data x₁, each (N, …), at times t (N,) or a scalar; x₀ and x₁ exactly at
    t = 0 and 1."""
    return torch.lerp(noise, data, _spread(t, noise))


def target(noise: Tensor, data: Tensor) -> Tensor:
    """The velocity x₁ − x₀ that a flow is trained towards, like its arguments."""
    return data - noise


def flow_matching_loss(
    network: Callable[..., Tensor],
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    norm: Norm = "l2",
    condition: Tensor | None = None,
) -> Tensor:
    """Each sample's mean squared or absolute error of the velocity at its time, (N,) float32.

    Args:
        network: (x_t, t) → velocity, or with a condition (x_t, t, condition) → velocity.
        data: (N, …), what is to be generated.
        noise: like `data`, standard normal.
        t: (N,).
        norm: "l2" squares the error, "l1" takes its absolute value.
        condition: (N, K), what the network is conditioned on, or None.

    Raises:
        ValueError: an unknown norm.
    """
    if norm not in ("l2", "l1"):
        raise ValueError(f"norm is 'l2' or 'l1', not {norm!r}")
    x = bridge(noise, data, t)
    velocity = network(x, t) if condition is None else network(x, t, condition)
    error = velocity.float() - target(noise, data).float()
    return (error.square() if norm == "l2" else error.abs()).flatten(1).mean(1)


def _spread(t: Tensor, like: Tensor) -> Tensor:
    """Times that multiply a batch."""
    t = t.to(like.dtype)
    return t if t.ndim == 0 else t.view(-1, *[1] * (like.ndim - 1))

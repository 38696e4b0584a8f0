"""What augmentation may do to a sample, and what it does to the one at a position."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np

from decovae.data import streams
from decovae.data.augmentation_orientation import Orientation
from decovae.data.volumes import Shape
from decovae.errors import InputError

DEGREE = 3
"""Of the polynomial that a bias field is the exponential of."""
TERMS = [(i, j, k) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i) for k in range(DEGREE + 1 - i - j)]
"""Degrees along the three axes of each of its 20 terms."""


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


@dataclass(frozen=True)
class Draw:
    """What happens to one sample, in the order of application; None is a transform that it is spared."""

    bias_field: np.ndarray | None
    """Coefficients of `TERMS`."""
    gibbs: float | None
    """Share of the radius in k-space that is cut off."""
    contrast: float | None
    """Exponent."""
    histogram_shift: np.ndarray | None
    """Where evenly spaced control points from darkest, 0, to brightest, 1, go."""
    scale: float | None
    """Factor."""
    shift: float | None
    """Summand."""
    orientation: Orientation


def draw(config: AugmentationConfig, patch: Shape, *, seed: int, position: int) -> Draw:
    """What `config` does to the sample of shape `patch` at `position`.

    Every number is drawn, needed or not: another probability then leaves what the other transforms do as it is.
    Planes whose two sides differ are not turned: a quarter turn would change the patch's shape.
    """
    random = streams.generator(seed, streams.AUGMENTATION, position)
    chances = random.random(12)
    bias_field = random.uniform(*config.bias_field_coefficients, len(TERMS))
    gibbs = random.uniform(*config.gibbs_alpha)
    contrast = random.uniform(*config.contrast_gamma)
    scale = 1 + random.uniform(-config.intensity_scale, config.intensity_scale)
    shift = random.uniform(-config.intensity_shift, config.intensity_shift)
    quarters = random.integers(1, 4, size=3)
    points = _control_points(random, config.histogram_shift_points)
    orientation = Orientation()
    for axis in range(3):
        if chances[6 + axis] < config.flip_probability:
            orientation = orientation.flipped(axis)
    for plane, chance, turns in zip(combinations(range(3), 2), chances[9:], quarters, strict=True):
        if chance < config.turn_probability and patch[plane[0]] == patch[plane[1]]:
            for _ in range(turns):
                orientation = orientation.turned(*plane)
    return Draw(
        bias_field=bias_field if chances[0] < config.bias_field_probability else None,
        gibbs=gibbs if chances[1] < config.gibbs_probability else None,
        contrast=contrast if chances[2] < config.contrast_probability else None,
        histogram_shift=points if chances[3] < config.histogram_shift_probability else None,
        scale=scale if chances[4] < config.intensity_scale_probability else None,
        shift=shift if chances[5] < config.intensity_shift_probability else None,
        orientation=orientation,
    )


def _control_points(random: np.random.Generator, count: int) -> np.ndarray:
    """Each inner point somewhere between where the one before went and where the one after stands."""
    points = np.linspace(0.0, 1.0, count)
    for inner in range(1, count - 1):
        points[inner] = random.uniform(points[inner - 1], points[inner + 1])
    return points


def check_augmentation(config: AugmentationConfig) -> None:
    """Refuse what no transform can do.

    Raises:
        InputError: naming the option and its value.
    """
    for field in fields(config):
        option, value = f"--data.augmentation.{field.name.replace('_', '-')}", getattr(config, field.name)
        if not np.isfinite(value).all():
            numbers = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"{option} {numbers}: give finite numbers.")
        if isinstance(value, tuple) and not value[0] <= value[1]:
            raise InputError(f"{option} {value[0]} {value[1]}: give the smaller one first.")
        if field.name.endswith("probability") and not 0 <= value <= 1:
            raise InputError(f"{option} {value}: must be between 0 and 1.")
        if field.name in ("intensity_scale", "intensity_shift") and not value >= 0:
            raise InputError(f"{option} {value}: must not be negative.")
    (low, high), (gamma, _) = config.gibbs_alpha, config.contrast_gamma
    if low < 0 or high > 1:
        raise InputError(f"--data.augmentation.gibbs-alpha {low} {high}: must be between 0 and 1.")
    if gamma <= 0:
        raise InputError(f"--data.augmentation.contrast-gamma {gamma}: must be above 0.")
    points = config.histogram_shift_points
    if points < 3:
        raise InputError(f"--data.augmentation.histogram-shift-points {points}: must be at least 3.")

"""Every transform means what MONAI's means, and is drawn as often and as strong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from monai import transforms as mt
from scipy import stats

from decovae.data.augmentation import Augmentation, AugmentationConfig
from decovae.data.augmentation_draws import Draw, draw
from decovae.data.augmentation_gibbs import cut_frequencies, kept_radius
from decovae.data.augmentation_orientation import Orientation, orient
from decovae.data.volumes import Shape

SHAPES = [(16, 16, 16), (15, 17, 13), (12, 8, 9), (7, 16, 10)]
PLANES = list(combinations(range(3), 2))
CONFIG = AugmentationConfig()
SPARED = Draw(None, None, None, None, None, None, Orientation())
DRAWS = 3000


def patch_of(shape: Shape) -> torch.Tensor:
    return torch.rand((1, *shape), generator=torch.Generator().manual_seed(0)) * 1.3 - 0.2


def ours(image: torch.Tensor, **changes: Any) -> torch.Tensor:
    """What a draw of nothing but `changes` does to an image `(1, D, H, W)`."""
    augment = Augmentation(CONFIG, (image.shape[1], image.shape[2], image.shape[3]))
    return augment.together(image[None], [replace(SPARED, **changes)])[0]


def agree(one: torch.Tensor, theirs: Any) -> None:
    torch.testing.assert_close(one, torch.as_tensor(theirs.as_tensor()), rtol=2e-5, atol=2e-6)


def bias_field(coefficients: np.ndarray) -> mt.Transform:
    transform = mt.RandBiasField(prob=1.0)
    transform._coeff, transform._do_transform = coefficients.tolist(), True
    return lambda image: transform(image, randomize=False)


def histogram_shift(points: np.ndarray) -> mt.Transform:
    transform = mt.RandHistogramShift(prob=1.0)
    transform.reference_control_points, transform.floating_control_points = np.linspace(0, 1, len(points)), points
    transform._do_transform = True
    return lambda image: transform(image, randomize=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_field(shape: Shape) -> None:
    image = patch_of(shape)
    for seed in range(3):
        coefficients = np.random.default_rng(seed).uniform(-0.3, 0.3, 20)
        agree(ours(image, bias_field=coefficients), bias_field(coefficients)(image))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.37, 0.5, 0.75, 0.93, 0.99, 1.0])
def test_gibbs_noise(shape: Shape, alpha: float) -> None:
    image = patch_of(shape)
    theirs = mt.GibbsNoise(alpha)(image)
    radius = kept_radius(alpha, shape)
    for largest in (radius, kept_radius(0.0, shape)):  # a loose bound costs time, and changes nothing
        rung = image.clone()
        cut_frequencies(rung, torch.tensor(radius).view(1, 1, 1, 1), largest=largest)
        agree(rung, theirs)


def test_gibbs_noise_of_a_batch_cuts_each_sample_at_its_own_radius() -> None:
    images = torch.stack([patch_of((12, 12, 12)) for _ in range(4)])
    alphas = [0.55, 0.6, 0.8, 0.95]
    rung = Augmentation(CONFIG, (12, 12, 12)).together(images, [replace(SPARED, gibbs=alpha) for alpha in alphas])
    for image, result, alpha in zip(images, rung, alphas, strict=True):
        agree(result, mt.GibbsNoise(alpha)(image))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.37, 2.0])
def test_contrast(shape: Shape, gamma: float) -> None:
    image = patch_of(shape)
    agree(ours(image, contrast=gamma), mt.AdjustContrast(gamma)(image))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [3, 10])
def test_histogram_shift(shape: Shape, count: int) -> None:
    image = patch_of(shape)
    for seed in range(3):
        inner = np.random.default_rng(seed).random(count - 2)
        points = np.sort(np.concatenate([[0.0], inner, [1.0]]))
        agree(ours(image, histogram_shift=points), histogram_shift(points)(image))


def test_scale_and_shift() -> None:
    image = patch_of((9, 10, 11))
    agree(ours(image, scale=1.07), mt.ScaleIntensity(minv=None, maxv=None, factor=0.07)(image))
    agree(ours(image, shift=-0.03), mt.ShiftIntensity(-0.03)(image))


@pytest.mark.parametrize("flips", list(product([False, True], repeat=3)))
def test_flips_and_turns_in_a_row(flips: tuple[bool, bool, bool]) -> None:
    image = patch_of((7, 7, 7))
    for turns in product(range(4), repeat=3):
        theirs: Any = image
        orientation = Orientation()
        for axis in np.flatnonzero(flips):
            theirs, orientation = mt.Flip(int(axis))(theirs), orientation.flipped(int(axis))
        for plane, quarters in zip(PLANES, turns, strict=True):
            theirs = mt.Rotate90(quarters, plane)(theirs)
            for _ in range(quarters):
                orientation = orientation.turned(*plane)
        result = torch.empty(7, 7, 7)
        orient(image[0], orientation, result)
        assert torch.equal(result, theirs.as_tensor()[0])


@pytest.mark.filterwarnings("ignore:The image's intensity is a single value", "ignore:torch.searchsorted")
def test_the_order_of_application() -> None:
    shape = (12, 12, 10)
    image = patch_of(shape)
    probabilities: Any = {field.name: 0.6 for field in fields(CONFIG) if field.name.endswith("probability")}
    often = replace(CONFIG, **probabilities)
    for position in range(25):
        drawn = draw(often, shape, seed=3, position=position)
        makers: list[tuple[object, Callable[..., mt.Transform]]] = [
            (drawn.bias_field, bias_field),
            (drawn.gibbs, mt.GibbsNoise),
            (drawn.contrast, mt.AdjustContrast),
            (drawn.histogram_shift, histogram_shift),
            (drawn.scale, lambda factor: mt.ScaleIntensity(minv=None, maxv=None, factor=factor - 1)),
            (drawn.shift, mt.ShiftIntensity),
        ]
        theirs = mt.Compose([make(strength) for strength, make in makers if strength is not None])(image)
        expected = torch.empty(shape)
        orient(torch.as_tensor(theirs)[0], drawn.orientation, expected)
        result = Augmentation(often, shape)(image[None], [position], seed=3)[0, 0]
        torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-5)


@cache
def our_draws() -> list[Draw]:
    return [draw(CONFIG, (16, 16, 16), seed=0, position=position) for position in range(DRAWS)]


@pytest.mark.parametrize(
    ("ours", "theirs", "strength"),
    [
        ("bias_field", mt.RandBiasField(prob=0.3, coeff_range=(0.0, 0.3)), lambda t: t._coeff),
        ("gibbs", mt.RandGibbsNoise(prob=0.3, alpha=(0.5, 1.0)), lambda t: t.sampled_alpha),
        ("contrast", mt.RandAdjustContrast(prob=0.3, gamma=(0.5, 2.0)), lambda t: t.gamma_value),
        ("histogram_shift", mt.RandHistogramShift(10, prob=0.05), lambda t: t.floating_control_points),
        ("scale", mt.RandScaleIntensity(0.1, prob=0.3), lambda t: 1 + t.factor),
        ("shift", mt.RandShiftIntensity(0.05, prob=0.3), lambda t: t._offset),
    ],
)
def test_strengths_are_distributed_as_monais(
    ours: str, theirs: mt.RandomizableTransform, strength: Callable[[Any], Any]
) -> None:
    drawn = [value for one in our_draws() if (value := getattr(one, ours)) is not None]
    share = theirs.prob
    assert abs(len(drawn) - DRAWS * share) < 4 * np.sqrt(DRAWS * share * (1 - share))
    theirs.set_random_state(seed=0)
    expected: list[Any] = []
    while len(expected) < len(drawn):
        theirs.randomize((16, 16, 16))
        if theirs._do_transform:
            expected.append(strength(theirs))
    for one, other in zip(np.atleast_2d(np.transpose(drawn)), np.atleast_2d(np.transpose(expected)), strict=True):
        assert stats.ks_2samp(one, other).pvalue > 1e-3


def test_transforms_are_drawn_independently() -> None:
    names = ("bias_field", "gibbs", "contrast", "scale", "shift")
    applied = np.array([[getattr(one, name) is not None for name in names] for one in our_draws()], dtype=float)
    off_diagonal = np.corrcoef(applied.T)[~np.eye(len(names), dtype=bool)]
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(DRAWS)


def test_orientations_are_distributed_as_monais() -> None:
    flips = [mt.RandFlip(0.5, axis) for axis in range(3)]
    turns = [mt.RandRotate90(0.5, 3, plane) for plane in PLANES]
    for number, transform in enumerate([*flips, *turns]):
        transform.set_random_state(seed=number)
    theirs: Counter[Orientation] = Counter()
    for _ in range(DRAWS):
        orientation = Orientation()
        for axis, flip in enumerate(flips):
            flip.randomize(None)
            orientation = orientation.flipped(axis) if flip._do_transform else orientation
        for plane, turn in zip(PLANES, turns, strict=True):
            turn.randomize()
            for _ in range(turn._rand_k if turn._do_transform else 0):
                orientation = orientation.turned(*plane)
        theirs[orientation] += 1
    mine = Counter(one.orientation for one in our_draws())
    assert len(mine) == len(theirs) == 48
    table = [[counts[orientation] for orientation in theirs] for counts in (mine, theirs)]
    assert stats.chi2_contingency(table).pvalue > 1e-3

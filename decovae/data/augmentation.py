"""The reference's augmentation, on batches of patches instead of whole volumes, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from decovae.data.augmentation_draws import AugmentationConfig, Draw, check_augmentation, draw
from decovae.data.augmentation_gibbs import cut_frequencies, kept_radius
from decovae.data.augmentation_intensity import (
    adjust_contrast,
    bias_tables,
    extremes,
    multiply_by_bias_field,
    shift_histogram,
)
from decovae.data.augmentation_orientation import orient
from decovae.data.volumes import Shape
from decovae.threads import one_thread

__all__ = ["Augmentation", "AugmentationConfig"]


class Augmentation:
    """Applies `config` to patches of one shape, each in its own way.

    Transforms mean what MONAI's mean. Planes whose two sides differ are not turned: a quarter turn would change the
    patch's shape. Constant patches, air, stay as they are.

    Raises:
        InputError: a value of `config` that no transform can do.
    """

    def __init__(self, config: AugmentationConfig, patch: Shape) -> None:
        check_augmentation(config)
        self.config, self.patch = config, patch

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, positions: Sequence[int], *, seed: int) -> torch.Tensor:
        """The augmented images, contiguous and apart from `images`; on a GPU, nothing waits for it.

        What happens to a sample is a function of `seed`, its position and its content: on a CPU to the bit whatever the
        batch and the number of threads, on a GPU up to rounding.

        Args:
            images: scaled intensities, `(N, 1, *patch)`, float32, on any device.
            positions: of the samples in the run, `N`.
            seed: the run's.

        Raises:
            ValueError: images of another shape or dtype, or not a position for each.
        """
        if images.shape != (len(positions), 1, *self.patch) or images.dtype != torch.float32:
            raise ValueError(
                f"{tuple(images.shape)}, {images.dtype}: not {len(positions)} patches of {self.patch}, float32"
            )
        draws = [draw(self.config, self.patch, seed=seed, position=int(position)) for position in positions]
        if images.device.type != "cpu":
            return self.together(images, draws)
        result = torch.empty_like(images, memory_format=torch.contiguous_format)
        with one_thread():
            # One at a time, so that neither its neighbours nor their number decide on a sample's last bits.
            for image, drawn, out in zip(images, draws, result, strict=True):
                if image.amin() == image.amax():
                    out.copy_(image)
                else:
                    self._augment(image, [drawn], out)
        return result

    @torch.no_grad()
    def together(self, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """`(N, 1, *patch)` images after what was drawn for them, each transform applied to all that it is due to."""
        result = torch.empty_like(images, memory_format=torch.contiguous_format)
        self._augment(images[:, 0], draws, result[:, 0])
        dark, bright = extremes(images[:, 0])
        return torch.where((dark == bright)[:, None], images.contiguous(), result)

    def _augment(self, patches: torch.Tensor, draws: Sequence[Draw], out: torch.Tensor) -> None:
        """Write `(N, D, H, W)` patches, augmented, into `out`."""
        work = patches.clone(memory_format=torch.contiguous_format)
        _apply(self._bias_field, work, [drawn.bias_field for drawn in draws])
        _apply(self._gibbs, work, [drawn.gibbs for drawn in draws])
        _apply(_contrast, work, [drawn.contrast for drawn in draws])
        _apply(_histogram_shift, work, [drawn.histogram_shift for drawn in draws])
        _apply(_scale, work, [drawn.scale for drawn in draws])
        _apply(_shift, work, [drawn.shift for drawn in draws])
        for patch, drawn, target in zip(work, draws, out, strict=True):
            orient(patch, drawn.orientation, target)

    def _bias_field(self, patches: torch.Tensor, coefficients: np.ndarray) -> None:
        depth, planes = bias_tables(coefficients, self.patch)
        multiply_by_bias_field(patches, _beside(patches, depth), _beside(patches, planes))

    def _gibbs(self, patches: torch.Tensor, alpha: np.ndarray) -> None:
        radius = kept_radius(alpha, self.patch)
        # A GPU's transforms are planned for each shape that they meet: let there be one.
        largest = radius.max() if patches.device.type == "cpu" else kept_radius(self.config.gibbs_alpha[0], self.patch)
        cut_frequencies(patches, _strength(patches, radius), largest=float(largest))


def _contrast(patches: torch.Tensor, gamma: np.ndarray) -> None:
    adjust_contrast(patches, _strength(patches, gamma))


def _histogram_shift(patches: torch.Tensor, points: np.ndarray) -> None:
    shift_histogram(patches, _beside(patches, points))


def _scale(patches: torch.Tensor, factor: np.ndarray) -> None:
    patches.mul_(_strength(patches, factor))


def _shift(patches: torch.Tensor, summand: np.ndarray) -> None:
    patches.add_(_strength(patches, summand))


def _apply(
    transform: Callable[[torch.Tensor, np.ndarray], None],
    patches: torch.Tensor,
    strengths: Sequence[np.ndarray | float | None],
) -> None:
    """Transform in place the patches that a strength was drawn for, all of them at once."""
    chosen = {index: strength for index, strength in enumerate(strengths) if strength is not None}
    if not chosen:
        return
    if len(chosen) == len(patches):
        transform(patches, np.stack(list(chosen.values())))
        return
    some = torch.stack([patches[index] for index in chosen])
    transform(some, np.stack(list(chosen.values())))
    for index, patch in zip(chosen, some, strict=True):
        patches[index] = patch


def _strength(patches: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """One number for each patch, in a shape that multiplies it."""
    return _beside(patches, values)[:, None, None, None]


def _beside(patches: torch.Tensor, values: np.ndarray) -> torch.Tensor:
    """Float32, where the patches are; copied to a GPU without waiting for it."""
    tensor = torch.from_numpy(values.astype(np.float32, copy=False))
    if patches.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(patches.device, non_blocking=True)

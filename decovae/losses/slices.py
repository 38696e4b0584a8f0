"""2D slices of 3D volumes in the three anatomical planes, for losses that see images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_AXES = (2, 3, 4)


def random_slices(
    fraction: float, *volumes: Tensor, seed: int, positions: Sequence[int] | None = None
) -> list[tuple[Tensor, ...]]:
    """The same random slices of each of several volumes, plane by plane.

    Each sample of the batch gives the same number of its slices, without replacement, and which is a function of the
    seed and of the sample's position. So neither a sample's slices nor a mean over all of them depends on how samples
    are divided into batches.

    Args:
        fraction: share of each sample's D, H and W slices to draw in each plane, in (0, 1]; at least one is drawn.
        volumes: (N, C, D, H, W) each, of one shape.
        seed: at least 0.
        positions: N numbers, at least 0, one a sample; None counts from 0.

    Returns:
        For each plane (across D, H and W: sagittal, coronal, axial in RAS axes) one (slices, C, rows, columns) tensor
        for each of ``volumes``, sample by sample.

    Raises:
        ValueError: if the volumes differ in shape or are not 5D, ``fraction`` is not in (0, 1], or there are not N
            positions.
    """
    shape = volumes[0].shape
    if len(shape) != 5 or any(volume.shape != shape for volume in volumes):
        raise ValueError(f"volumes must share one (N, C, D, H, W) shape, not {[tuple(v.shape) for v in volumes]}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction of slices must be in (0, 1], not {fraction}")
    positions = range(shape[0]) if positions is None else positions
    if len(positions) != shape[0]:
        raise ValueError(f"there must be one position a sample: {shape[0]}, not {len(positions)}")
    counts = [max(1, round(fraction * shape[axis])) for axis in _AXES]
    drawn = []
    for position in positions:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(position,))))
        drawn.append([generator.permutation(shape[axis])[:n] for axis, n in zip(_AXES, counts, strict=True)])
    # Of all planes in one copy to the device, which nothing waits for.
    chosen = np.concatenate([np.concatenate(of_plane) for of_plane in zip(*drawn, strict=True)])
    indices = _on_device(torch.tensor(chosen), volumes[0].device).split([shape[0] * n for n in counts])
    planes = []
    sample = torch.arange(shape[0], device=volumes[0].device)[:, None]
    for axis, index in zip(_AXES, indices, strict=True):
        place = index.view(shape[0], -1)
        planes.append(tuple(volume.movedim(axis, 1)[sample, place].flatten(0, 1) for volume in volumes))
    return planes


def _on_device(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)

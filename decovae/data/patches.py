"""Training patches and the split: which sample stands at which position, as pure functions of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from decovae.data import streams
from decovae.data.augmentation import Augmentation, AugmentationConfig
from decovae.data.resample import resample_crop
from decovae.data.volumes import Shape, VolumeRecord, Volumes
from decovae.errors import InputError


class Sample(TypedDict):
    """One training patch: `image` is `(1, *patch)`, float32; `subject` whose it is; `position` where it stands."""

    image: torch.Tensor
    subject: str
    position: int


def split_subjects(records: Sequence[VolumeRecord], *, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation volumes.

    Subjects are ranked by a hash of the seed and their name, and the first `validation` of them, with all their
    volumes, are held out. A subject's rank does not depend on who else takes part.

    Raises:
        InputError: no subject would be left for training.
    """
    subjects = {record.subject for record in records}
    if not 0 <= validation < len(subjects):
        raise InputError(
            f"{validation} subjects cannot be held out for validation: there are {len(subjects)}, "
            "and at least one has to be left for training."
        )
    ranked = sorted(subjects, key=lambda subject: (sha256(f"{seed}:{subject}".encode()).digest(), subject))
    held_out = set(ranked[:validation])
    train = [index for index, record in enumerate(records) if record.subject not in held_out]
    return train, [index for index, record in enumerate(records) if record.subject in held_out]


def load_volume(volumes: Volumes, index: int, grid: Shape) -> torch.Tensor:
    """A whole volume, resized to `grid` and scaled, not clipped: `(1, *grid)`, float32."""
    return _crop(volumes, index, grid=grid, corner=(0, 0, 0), size=grid)


class PatchDataset(Dataset[Sample]):
    """Random patches, one at each position 0, 1, 2, … without end.

    A position is the number of a sample in the whole training, over all ranks: sample `p` is a function of `seed` and
    `p` alone. So a run is resumed by starting at another position, ranks share the work by taking different positions,
    and there is no state to save. `len(indices)` successive positions, from a multiple of it, visit every volume once.

    Args:
        volumes: where the volumes are.
        indices: which of them to draw from.
        grid: the size that every volume is resized to, `(D, H, W)`.
        patch: the size of the crops.
        seed: of the order, the crops and the augmentation.
        augmentation: applied to the patch, after cropping; None for none.

    Raises:
        InputError: the patch does not fit into the grid.
        ValueError: no indices.
    """

    def __init__(
        self,
        volumes: Volumes,
        indices: Sequence[int],
        *,
        grid: Shape,
        patch: Shape,
        seed: int,
        augmentation: AugmentationConfig | None = None,
    ) -> None:
        if not indices:
            raise ValueError("indices is empty: there is nothing to draw patches from")
        if any(size > room for size, room in zip(patch, grid, strict=True)):
            raise InputError(f"A patch of {patch} voxels does not fit into the grid of {grid}.")
        self.volumes = volumes
        self.indices = list(indices)
        self.grid = grid
        self.patch = patch
        self.seed = seed
        # Built here, not at the first sample: forked workers then share the import of MONAI, which takes seconds.
        self.augment = None if augmentation is None else Augmentation(augmentation, patch)

    def __getitem__(self, position: int) -> Sample:
        """The sample at `position`, at least 0; pure, so equal in every process."""
        index = self.indices[visited(position, len(self.indices), seed=self.seed)]
        room = np.subtract(self.grid, self.patch) + 1
        corner = streams.generator(self.seed, streams.CROP, position).integers(room)
        depth, height, width = (int(start) for start in corner)
        image = _crop(self.volumes, index, grid=self.grid, corner=(depth, height, width), size=self.patch)
        if self.augment is not None:
            seed = streams.sequence(self.seed, streams.AUGMENTATION, position).generate_state(1)[0]
            image = self.augment(image, seed=int(seed))
        return {"image": image, "subject": self.volumes.records[index].subject, "position": position}


def visited(position: int, count: int, *, seed: int) -> int:
    """Which of `count` items stands at `position`: every item once among `count` positions from a multiple of it on."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return streams.generator(seed, streams.ORDER, epoch).permutation(count)


def _crop(volumes: Volumes, index: int, *, grid: Shape, corner: Shape, size: Shape) -> torch.Tensor:
    record = volumes.records[index]
    crop = resample_crop(volumes.read(index), grid=grid, corner=corner, size=size, low=record.low, high=record.high)
    return crop[None]

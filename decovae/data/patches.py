"""Training patches and the split: which sample stands at which position, as pure functions of the seed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from decovae.data import streams
from decovae.data.foreground import places_on_grid
from decovae.data.pages import will_need
from decovae.data.resample import resample_crop
from decovae.data.splits import key_of, ranked_subjects
from decovae.data.store import StoreVolumes
from decovae.data.volumes import Shape, VolumeRecord, Volumes, times
from decovae.errors import InputError

AS_STORED = frozenset(np.dtype(name) for name in ("uint8", "int16", "float16", "float32"))
"""Types whose values single precision holds, so that they can be scaled later, wherever that is cheapest."""


class Crop(NamedTuple):
    """A patch as a volume holds it.

    Attributes:
        voxels: the patch's shape, of a type in `AS_STORED`; perhaps a view of a memory map that nobody has read yet.
        low, high: the values of `voxels` that are scaled to 0 and to 1.
        subject: whose it is.
        position: where it stands in the order of samples.
    """

    voxels: np.ndarray
    low: float
    high: float
    subject: str
    position: int


def split_subjects(subjects: Sequence[str], *, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation volumes, of which `subjects` says whose each is.

    The first `validation` of `ranked_subjects`, with all their volumes, are held out.

    Raises:
        InputError: no subject would be left for training.
    """
    ranked = ranked_subjects(subjects, seed=seed)
    if not 0 <= validation < len(ranked):
        raise InputError(
            f"{validation} subjects cannot be held out for validation: there are {len(ranked)}, "
            "and at least one has to be left for training."
        )
    held_out = set(ranked[:validation])
    train = [index for index, subject in enumerate(subjects) if key_of(subject) not in held_out]
    return train, [index for index, subject in enumerate(subjects) if key_of(subject) in held_out]


def load_volume(volumes: Volumes, index: int, grid: Shape) -> torch.Tensor:
    """A whole volume, resized to `grid` and scaled, not clipped: `(1, *grid)`, float32."""
    record, volume = volumes.records[index], volumes.read(index)
    return resample_crop(volume, grid=grid, corner=(0, 0, 0), size=grid, low=record.low, high=record.high)[None]


class WithFollowing(list[int]):
    """Positions of a batch, and those of the next one that the same process is going to be asked for.

    Attributes:
        following: the latter.
    """

    following: Sequence[int] = ()


class PatchDataset(Dataset[Crop]):
    """Random patches, one at each position 0, 1, 2, … without end.

    A position is the number of a sample in the whole training, over all ranks: sample `p` is a function of `seed` and
    `p` alone. So a run is resumed by starting at another position, ranks share the work by taking different positions,
    and there is no state to save. `len(indices)` successive positions, from a multiple of it, visit every volume once.

    Args:
        volumes: where the volumes are.
        indices: which of them to draw from.
        grid: the size that every volume is resized to, `(D, H, W)`.
        patch: the size of the crops.
        seed: of the order and the crops.
        foreground: share of the crops that contain a place in the brain, of volumes whose record knows one; the others,
            of which many do too, may lie anywhere.

    Raises:
        InputError: the patch does not fit into the grid.
        ValueError: no indices, or `foreground` is no share.
    """

    def __init__(
        self,
        volumes: Volumes,
        indices: Sequence[int],
        *,
        grid: Shape,
        patch: Shape,
        seed: int,
        foreground: float = 0.0,
    ) -> None:
        if not len(indices):
            raise ValueError("indices is empty: there is nothing to draw patches from")
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground is a share from 0 to 1, not {foreground}")
        if any(size > room for size, room in zip(patch, grid, strict=True)):
            raise InputError(f"A patch of {times(patch)} voxels does not fit into the grid of {times(grid)}.")
        self.volumes = volumes
        # An array: a forked worker would come to own a list's numbers one by one, as it counts who refers to them.
        self.indices = np.asarray(indices, dtype=np.int64)
        self.grid = grid
        self.patch = patch
        self.seed = seed
        self.foreground = foreground
        self._ahead: dict[int, Crop] = {}

    def __getitem__(self, position: int) -> Crop:
        """The sample at `position`, at least 0; pure, so equal in every process.

        Raises:
            InputError: its volume cannot be read any more.
        """
        index = int(self.indices[visited(position, len(self.indices), seed=self.seed)])
        record, volume = self.volumes.records[index], self.volumes.read(index)
        corner, low, high = self.corner(position, record), record.low, record.high
        if volume.shape == self.grid and volume.dtype in AS_STORED:
            voxels = volume[tuple(slice(start, start + size) for start, size in zip(corner, self.patch, strict=True))]
            if not will_need(voxels):
                voxels = voxels.copy()  # lets go of the rest of the volume
        else:
            crop = resample_crop(volume, grid=self.grid, corner=corner, size=self.patch, low=low, high=high)
            voxels, low, high = crop.numpy(), 0.0, 1.0
        return Crop(voxels, low, high, record.subject, position)

    def __getitems__(self, positions: Sequence[int]) -> list[Crop]:
        """A batch at once, for torch's loader: what all of its crops touch is on its way before one is waited for.

        Where `positions` say which ones follow (see `WithFollowing`), what crops of a store touch there is on its way
        too, and the disk works while this batch is finished.
        """
        crops = [self._ahead[position] if position in self._ahead else self[position] for position in positions]
        self._ahead.clear()
        if isinstance(positions, WithFollowing) and isinstance(self.volumes, StoreVolumes):
            with contextlib.suppress(InputError):  # to be raised when it is its turn
                for position in positions.following:
                    self._ahead[position] = self[position]
        return crops

    def corner(self, position: int, record: VolumeRecord) -> Shape:
        """The lowest voxel of the grid in the crop at `position`, which is of the volume of `record`."""
        lowest, room = np.zeros(3, dtype=np.int64), np.subtract(self.grid, self.patch)
        generator = streams.generator(self.seed, streams.CROP, position)
        if self.foreground and record.foreground:
            chance = streams.generator(self.seed, streams.FOREGROUND, position)
            if chance.random() < self.foreground:
                places = places_on_grid(record.foreground, self.grid)
                place = places[chance.integers(len(places))]
                lowest, room = np.maximum(place - self.patch + 1, 0), np.minimum(place, room)
        depth, height, width = (int(start) for start in generator.integers(lowest, room + 1))
        return depth, height, width


def visited(position: int, count: int, *, seed: int) -> int:
    """Which of `count` items stands at `position`: every item once among `count` positions from a multiple of it on."""
    epoch, place = divmod(position, count)
    return int(_order(seed, epoch, count)[place])


@lru_cache(maxsize=2)  # an epoch and the next: a batch may have samples of both
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return streams.generator(seed, streams.ORDER, epoch).permutation(count).astype(np.uint32)

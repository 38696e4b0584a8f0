"""Statistics of the slices of a set of volumes: moments of them all, and some of them for what needs neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from decovae.data.volumes import Shape
from decovae.evaluation.slices import Features, Slicing
from decovae.metrics.frechet import FeatureMoments, feature_moments
from decovae.metrics.slice_features import PLANES
from decovae.runtime import Runtime

GROUPS = 16
"""Into which volumes are dealt: the unit that processes share. Fixed, so that results do not depend on how many
processes there are; more than 16 processes find nothing to do."""

Key = tuple[str, str]
"""A network's name and a plane."""


class SliceSet(NamedTuple):
    """Of all slices of a set of volumes, by network and plane: their moments, and some slices' features (n, F)."""

    moments: dict[Key, FeatureMoments]
    subset: dict[Key, Tensor]


def dealt(count: int, runtime: Runtime) -> list[int]:
    """The places among 0 to `count` − 1 that are this process's, group by group."""
    groups = [list(range(group, count, GROUPS)) for group in range(min(GROUPS, count))]
    return [place for group in groups[runtime.rank :: runtime.world] for place in group]


class SliceStatistics:
    """Gathers features volume by volume, in memory that does not depend on how many volumes there are.

    Args:
        slicing: the networks and their slices.
        grid: voxels of a volume.
        count: volumes of the whole set.
        runtime: the processes that the set is dealt to.
        subset: slices of a plane to keep the features of, 0 for none; spread evenly over the middle halves of the
            volumes, for slices without a brain are all alike, and near to each other in any set.
    """

    def __init__(self, slicing: Slicing, grid: Shape, count: int, runtime: Runtime, *, subset: int) -> None:
        self._runtime = runtime
        self._keys = [(network.name, plane) for network in slicing.networks for plane in PLANES]
        self._middle = {plane: middle_half(slices) for plane, slices in slicing.per_volume(grid).items()}
        self._chosen = {plane: even_places(count * len(middle), subset) for plane, middle in self._middle.items()}
        self._groups: dict[int, dict[Key, FeatureMoments]] = {}
        self._subset: list[tuple[int, dict[Key, Tensor]]] = []

    def add(self, place: int, features: Features) -> None:
        """Features of the volume at a place; places come as `dealt` has them."""
        if self._runtime.world == 1 and place % GROUPS not in self._groups and len(self._groups) == 2:
            first, second = sorted(self._groups)  # as merging them at the end would, but their memory is free now
            later = self._groups.pop(second)
            self._groups[first] = {key: moments.merge(later[key]) for key, moments in self._groups[first].items()}
        found = {key: feature_moments(features[key[0]][key[1]]) for key in self._keys}
        group = self._groups.setdefault(place % GROUPS, {})
        for key, moments in found.items():
            group[key] = group[key].merge(moments) if key in group else moments
        self._subset.append((place, {key: self._part(place, key, features) for key in self._keys}))

    def _part(self, place: int, key: Key, features: Features) -> Tensor:
        name, plane = key
        middle, chosen = self._middle[plane], self._chosen[plane]
        first = place * len(middle)
        here = chosen[(chosen >= first) & (chosen < first + len(middle))] - first + middle.start
        return features[name][plane][here.to(features[name][plane].device)].cpu()

    def collect(self) -> SliceSet:
        """The statistics of what all processes have added, on every process; a collective call.

        Raises:
            ValueError: nothing was added anywhere.
        """
        moments = {key: self._merged(key) for key in self._keys}
        parts = [part for parts in self._runtime.gather(self._subset) for part in parts]
        parts.sort(key=lambda part: part[0])
        return SliceSet(moments, {key: torch.cat([part[key] for _, part in parts]) for key in self._keys})

    def _merged(self, key: Key) -> FeatureMoments:
        mine = {group: moments[key] for group, moments in self._groups.items()}
        if self._runtime.world > 1:  # what another process sends would come back on this one's device
            mine = {group: moments.to("cpu") for group, moments in mine.items()}
        groups = {group: moments for part in self._runtime.gather(mine) for group, moments in part.items()}
        ordered: Sequence[FeatureMoments] = [groups[group] for group in sorted(groups)]
        return reduce(FeatureMoments.merge, ordered)


def even_places(total: int, most: int) -> Tensor:
    """At most `most` of the places 0 to `total` − 1, spread evenly, ascending, (n,), int64."""
    chosen = min(total, most)
    return torch.arange(chosen) * total // max(chosen, 1)


def middle_half(slices: int) -> range:
    """The slices of a plane that show a brain in any volume; at least one."""
    return range(slices // 4, max(slices - slices // 4, slices // 4 + 1))

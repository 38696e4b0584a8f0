"""What an evaluation measures volumes with, whatever they are: slices' features, tissue, thumbnails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decovae.data.cache import recall, remember
from decovae.data.frame import Frame
from decovae.data.volumes import Shape
from decovae.evaluation.slice_sets import SliceSet, SliceStatistics, dealt
from decovae.evaluation.slices import Features, Slicing, digest_of
from decovae.evaluation.stopwatch import Stopwatch
from decovae.evaluation.together import gathered
from decovae.evaluation.volume_sets import VolumeSet
from decovae.generation.ahead import worked_ahead
from decovae.generation.progress import Progress
from decovae.metrics.memorisation import thumbnail
from decovae.metrics.tissue import METHOD, tissue_volumes
from decovae.runtime import Runtime
from decovae.threads import one_thread

TISSUE_VERSION = 1  # raise it when the method's figures change: it is part of what is remembered

Tissue = dict[str, float]
"""Volumes of csf, grey and white matter, in ml."""


@dataclass(frozen=True)
class Tools:
    """Where and with what to measure.

    Attributes:
        runtime: the processes.
        grid: voxels of every volume.
        slicing: networks for slices' features.
        threads: volumes that this process works on side by side.
    """

    runtime: Runtime
    grid: Shape
    slicing: Slicing
    threads: int

    @property
    def on_cpu(self) -> bool:
        """Where the networks are."""
        return self.runtime.device.type == "cpu"


class Loaded(NamedTuple):
    """A volume, (1, D, H, W), on the CPU, not clipped, the digest of its clipped intensities, and kept features."""

    volume: Tensor
    digest: str
    known: Features
    watch: Stopwatch


class SetMeasures(NamedTuple):
    """Of a set of volumes: their slices, their tissue and thumbnails (n, F) in order, and seconds by part."""

    slices: SliceSet
    tissue: list[Tissue]
    thumbnails: Tensor
    seconds: dict[str, float]


class _Measured(NamedTuple):
    features: Features
    volume: Tensor
    loaded: Loaded


class _Row(NamedTuple):
    tissue: Tissue
    thumbnail: Tensor
    seconds: dict[str, float]


def load(volumes: VolumeSet, place: int, tools: Tools) -> Loaded:
    """A volume, and what is known of it already."""
    watch = Stopwatch()
    with watch.time("load"):
        volume = volumes.load(place)
        digest = digest_of(volume.clamp(0, 1))
        return Loaded(volume, digest, tools.slicing.recall(digest), watch)


def tissue_of(volume: Tensor, frame: Frame, *, digest: str | None) -> Tissue:
    """Volumes of tissue in a volume (1, D, H, W) on the CPU, clipped to [0, 1]; remembered for one with a digest."""
    voxel_ml = abs(float(np.linalg.det(frame.matrix[:3, :3]))) / 1000
    key = f"tissue {TISSUE_VERSION} {METHOD} {voxel_ml!r} {digest}"
    if digest is not None and (known := recall(key)) is not None:
        return known
    found = tissue_volumes(volume[0].numpy(), voxel_ml)
    tissue = {"csf": float(found.csf), "grey": float(found.grey), "white": float(found.white)}
    if digest is not None:
        remember(key, tissue)
    return tissue


def measure_set(volumes: VolumeSet, tools: Tools, *, title: str, subset: int) -> SetMeasures:
    """Slices, tissue and thumbnails of a set, on every process; at least one volume.

    Args:
        volumes: the set.
        tools: what to measure with.
        title: of the progress.
        subset: see `SliceStatistics`.

    Raises:
        InputError: a volume cannot be read, or is not finite.
    """
    runtime, count = tools.runtime, len(volumes.names)
    statistics = SliceStatistics(tools.slicing, tools.grid, count, runtime, subset=subset)

    def compute(place: int, loaded: Loaded) -> _Measured:
        with torch.no_grad(), loaded.watch.time("features", on=runtime.device):
            volume = loaded.volume.clamp(0, 1)
            features = tools.slicing.measure(volume.to(runtime.device), known=loaded.known)
        return _Measured(features, volume, loaded)

    def finish(place: int, measured: _Measured) -> tuple[Features, _Row]:
        _, digest, known, watch = measured.loaded
        with watch.time("features"):
            tools.slicing.remember(digest, measured.features, known=known)
        with watch.time("tissue"):
            tissue = tissue_of(measured.volume, volumes.frame(place), digest=digest if tools.slicing.cache else None)
        return measured.features, _Row(tissue, thumbnail(measured.volume), watch.seconds)

    rows = share(
        tools,
        count,
        title=title,
        load=lambda place: load(volumes, place, tools),
        compute=compute,
        finish=finish,
        take=statistics.add,
    )
    thumbnails = torch.stack([row.thumbnail for row in rows])
    return SetMeasures(statistics.collect(), [row.tissue for row in rows], thumbnails, added(rows))


def thumbnails_of(volumes: VolumeSet, tools: Tools, *, title: str) -> Tensor:
    """Thumbnails of volumes of which nothing else is asked, (n, F), on every process; empty for no volumes.

    Raises:
        InputError: a volume cannot be read.
    """
    if not volumes.names:
        return torch.empty(0)
    found = share(
        tools,
        len(volumes.names),
        title=title,
        load=lambda place: thumbnail(volumes.load(place).clamp(0, 1)),
        compute=lambda place, loaded: loaded,
        finish=lambda place, loaded: (None, loaded),
        take=lambda place, nothing: None,
    )
    return torch.stack(found)


def share(
    tools: Tools,
    count: int,
    *,
    title: str,
    load: Callable[[int], Any],
    compute: Callable[[int, Any], Any],
    finish: Callable[[int, Any], tuple[Any, Any]],
    take: Callable[[int, Any], None],
) -> list[Any]:
    """Rows of all volumes in order, on every process, from the three steps of `worked_ahead`.

    Args:
        tools: where to work.
        count: volumes.
        title: of the progress.
        load, compute, finish: the steps; the last returns what `take` is given, in order, and the volume's row.
        take: gathers what is too large for a row; called in this thread.
    """
    runtime = tools.runtime

    def part() -> list[tuple[int, Any]]:
        mine = dealt(count, runtime)
        rows = []
        results = worked_ahead(mine, load, compute, finish, threads=tools.threads, on_cpu=tools.on_cpu)
        with Progress(title, len(mine), visible=runtime.main) as progress, one_thread(), contextlib.closing(results):
            for place, (large, row) in zip(mine, results, strict=True):
                take(place, large)
                rows.append((place, row))
                progress.advance()
        return rows

    return gathered(runtime, part)


def added(rows: list[Any]) -> dict[str, float]:
    """Seconds by part, added up over volumes."""
    total: dict[str, float] = {}
    for row in rows:
        add_seconds(total, row.seconds)
    return total


def add_seconds(total: dict[str, float], seconds: Mapping[str, float]) -> None:
    """Add seconds by part to others."""
    for part, value in seconds.items():
        total[part] = total.get(part, 0.0) + value

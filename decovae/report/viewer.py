"""The volumes of the interactive slice viewer: chosen, shrunk to fit a page, and packed into pictures.

The viewer itself, `templates/viewer.js`, is a page of plain canvas code. The ones that nilearn bundles were the other
choice: brainsprite draws one volume with one cursor and takes cubic voxels for granted, and NiiVue needs WebGL and
2 MB; here two volumes of any voxel size share one cursor, can be subtracted, and answer to keys and touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from decovae.data.resample import resample_crop
from decovae.data.volumes import Shape, times
from decovae.report.images import Scan, data_uri, read_scan
from decovae.report.material import PHASE_NAMES, PHASES, kept_volumes, sample_files, sample_phases, subjects
from decovae.report.models import Model

EXACT_VOXELS = 9_000_000
"""Voxels of all originals and reconstructions together; packed without loss they take about 0.5 bytes each."""

SAMPLE_VOXELS = 24_000_000
"""Voxels of all samples together; packed as good photographs are, they take about 0.2 bytes each."""

MOST_SUBJECTS = 2
MOST_SAMPLES = 64


@dataclass(frozen=True)
class Entry:
    """A volume to choose: under which heading, by which name, from which file, packed without loss or not."""

    group: str
    label: str
    path: Path
    exact: bool


@dataclass(frozen=True)
class Viewer:
    """What the page's script reads, and what the page's text says about it.

    Attributes:
        content: in JSON's types: ``volumes``, and the numbers of those that are shown first, ``left`` and ``right``.
        groups: headings, each with the numbers of its volumes.
        notes: what was left out or shrunk.
    """

    content: dict[str, Any]
    groups: dict[str, list[int]]
    notes: list[str]


def build_viewer(models: Sequence[Model]) -> Viewer | None:
    """The viewer of all volumes that the models left, or None where they left none.

    Raises:
        InputError: a volume cannot be read.
    """
    exact, notes = list(_reconstructions(models)), []
    samples, left_out = _samples(models)
    if not exact and not samples:
        return None
    if left_out:
        notes.append(left_out)
    if (kept := len(subjects(models))) > MOST_SUBJECTS:
        notes.append(f"Of {kept} subjects that were kept, {MOST_SUBJECTS} are here.")
    volumes: list[dict[str, Any]] = []
    groups: dict[str, list[int]] = {}
    shrunk = set()
    for kind, entries, room in (
        ("Originals and reconstructions", exact, EXACT_VOXELS),
        ("Samples", samples, SAMPLE_VOXELS),
    ):
        for entry in entries:
            scan = read_scan(entry.path)
            smaller = shrink(scan, room // len(entries))
            if smaller is not scan:
                shrunk.add((kind, scan.frame.shape, smaller.frame.shape))
            groups.setdefault(entry.group, []).append(len(volumes))
            volumes.append({"label": entry.label, **pack(smaller, exact=entry.exact)})
    notes += [
        f"{kind} of {times(before)} voxels are shown with {times(after)}, to keep the page small."
        for kind, before, after in shrunk
    ]
    # A reconstruction of the last model beside the original, or the first samples of two models.
    reconstructions = [place for place, entry in enumerate(exact) if entry.path != exact[0].path]
    right = reconstructions[-1] if reconstructions else list(groups.values())[-1][0]
    return Viewer({"volumes": volumes, "left": 0, "right": right}, groups, sorted(notes))


def shrink(scan: Scan, most: int) -> Scan:
    """The volume with at most `most` voxels: itself, or averaged to voxels that are as nearly cubic as can be."""
    shape = scan.frame.shape
    if math.prod(shape) <= most:
        return scan
    sizes = np.linalg.norm(scan.frame.matrix[:3, :3], axis=0)
    low, high = sizes.min(), float(np.multiply(shape, sizes).max())
    for _ in range(40):  # the edge of a voxel in millimetres, by bisection
        edge = math.sqrt(low * high)
        low, high = (low, edge) if math.prod(_cut(shape, sizes, edge)) <= most else (edge, high)
    grid = _cut(shape, sizes, high)
    voxels = resample_crop(scan.voxels, grid=grid, corner=(0, 0, 0), size=grid).numpy()
    return Scan(voxels.clip(0, 1), scan.frame.on_grid(grid))


def pack(scan: Scan, *, exact: bool) -> dict[str, Any]:
    """A volume in JSON's types: 8 bits a voxel, its axial slices as tiles of one picture.

    Slice z is the tile in column ``z % columns``; in it x runs to the right and y downwards, both from voxel 0.
    """
    depth, height, width = scan.frame.shape
    columns = math.ceil(math.sqrt(width * height / depth))
    rows = -(-width // columns)
    tiles = np.zeros((rows * columns, height, depth), dtype=np.uint8)
    tiles[:width] = np.round(255 * scan.voxels).astype(np.uint8).transpose(2, 1, 0)
    mosaic = tiles.reshape(rows, columns, height, depth).swapaxes(1, 2).reshape(rows * height, columns * depth)
    matrix = scan.frame.matrix
    return {
        "shape": [depth, height, width],
        "size": [round(float(size), 4) for size in np.linalg.norm(matrix[:3, :3], axis=0)],
        "origin": [round(float(place), 3) for place in matrix[:3, 3]],
        "columns": columns,
        "data": data_uri(Image.fromarray(np.ascontiguousarray(mosaic)), lossless=exact),
    }


def _reconstructions(models: Sequence[Model]) -> Iterator[Entry]:
    shown = list(subjects(models).items())[:MOST_SUBJECTS]
    for subject, original in shown:
        yield Entry("Originals", f"{subject}, original", original, exact=True)
    for model in models:
        for phase in PHASES:
            for entry in kept_volumes(model, phase):
                if entry.subject in dict(shown):
                    label = f"{model.name}, {entry.subject}, {PHASE_NAMES[phase]}"
                    yield Entry(f"{model.name}: reconstructions", label, entry.reconstruction, exact=True)


def _samples(models: Sequence[Model]) -> tuple[list[Entry], str]:
    sets = [(model, phase, sample_files(model, phase)) for model, phase in sample_phases(models)]
    each = max(1, MOST_SAMPLES // max(1, len(sets)))
    entries = []
    for model, phase, files in sets:
        samples = model.samples(phase)
        seed = "" if samples is None or samples.seed is None else f", seed {samples.seed}"
        for path in files[:each]:
            number = path.name.removeprefix("sample-").removesuffix(".nii.gz").lstrip("0") or "0"
            label = f"{model.name}, sample {number}{seed}, {PHASE_NAMES[phase]}"
            entries.append(Entry(f"{model.name}: samples (synthetic)", label, path, exact=False))
    most = max((len(files) for _, _, files in sets), default=0)
    return entries, f"Of {most} samples a set the first {each} are here." if most > each else ""


def _cut(shape: Shape, sizes: np.ndarray, edge: float) -> Shape:
    """The grid over the same box with voxels of about `edge` millimetres, along no axis finer than it was."""
    depth, height, width = (
        min(count, max(1, round(count * size / edge))) for count, size in zip(shape, sizes, strict=True)
    )
    return depth, height, width

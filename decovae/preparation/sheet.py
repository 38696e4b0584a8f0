"""Contact sheets: what the accepted volumes of a preparation look like, and the rejected ones with their reasons."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from decovae.data.frame import Frame
from decovae.data.nifti import read_nifti
from decovae.data.store import map_file
from decovae.data.volumes import Affine, Shape, affine_rows
from decovae.files import write_atomically
from decovae.preparation.candidates import Candidate

MOST = 24
COLUMNS = 4
SIDE = 100
"""Voxels along an axis of a small volume, at most: more than a tile has pixels for it."""
LINE = 52
LINES = 6
GREY = "0.35"

Thing = TypeVar("Thing")


class Small(NamedTuple):
    """A volume with few voxels, `(D, H, W)`, intensities shown from 0 to 1, and where they lie."""

    voxels: np.ndarray
    affine: Affine


class Tile(NamedTuple):
    """A place on a sheet: a title, what is to be said below it, and a volume if it can be shown."""

    title: str
    text: str
    volume: Small | None


def spread(things: Sequence[Thing], most: int = MOST) -> list[Thing]:
    """At most `most` of them, from the first to the last at equal distances."""
    if len(things) <= most:
        return list(things)
    return [things[round(place)] for place in np.linspace(0, len(things) - 1, most)]


def small_prepared(folder: Path, entry: Mapping[str, Any], *, grid: Shape, whole_box: bool) -> Small:
    """A volume of a store.

    Args:
        folder: the store's.
        entry: the volume's in the index.
        grid: its size.
        whole_box: whether the store's grid is the file's box cut anew, and not a grid whose place the entry tells.
    """
    voxels = map_file(folder / entry["file"], grid, entry["dtype"])
    depth, height, width = entry["shape"]
    frame = Frame((depth, height, width), affine_rows(entry["affine"]))
    return _small(voxels, frame.on_grid(grid).affine if whole_box else frame.affine, entry["low"], entry["high"])


def small_rejected(candidate: Candidate, *, limit: int) -> Small | None:
    """A volume as its file has it, or None where there is nothing to see.

    Raises:
        InputError: the file cannot be read.
    """
    voxels, inverted, affine, *_ = read_nifti(candidate.path, limit=limit)
    seen = _thinned(voxels)[0].astype(np.float64)
    finite = seen[np.isfinite(seen)]
    if not finite.size:
        return None
    low, high = np.percentile(finite, (100, 0.5) if inverted else (0, 99.5))
    return _small(voxels, affine, low, high if high != low else low + 1)


def save_sheet(tiles: Sequence[Tile], path: Path, *, title: str) -> None:
    """Write a PNG of tiles, four in a row; the same tiles give the same bytes.

    Args:
        tiles: each three cuts through the middle of its volume, drawn by nilearn, or grey where there is none.
        path: appears whole or not at all.
        title: printed above.

    Raises:
        OSError: it cannot be written.
        ModuleNotFoundError: matplotlib or nilearn is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(tiles) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.3 * rows + 0.5), facecolor="white")
    FigureCanvasAgg(figure)
    height = 1 - 0.5 / (2.3 * rows + 0.5)  # below the title
    figure.text(0.5, 1 - (1 - height) / 2, title, ha="center", va="center", fontsize=13, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks, and what nilearn thinks of volumes
        for place, tile in enumerate(tiles):
            row, column = divmod(place, COLUMNS)
            _draw(figure, tile, (column / COLUMNS, height * (1 - (row + 1) / rows), 1 / COLUMNS, height / rows))
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80, metadata={"Software": None}))


def _draw(figure: Any, tile: Tile, box: tuple[float, float, float, float]) -> None:
    """One tile into its box: left, bottom, width, height, shares of the figure."""
    left, bottom, width, height = box
    text = "\n".join(textwrap.wrap(tile.text, LINE, max_lines=2 if tile.volume else LINES, placeholder=" …"))
    top = bottom + 0.97 * height
    figure.text(left + width / 2, top, _short(tile.title), ha="center", va="top", fontsize=10, parse_math=False)
    words = figure.text(
        left + width / 2, top - 0.11 * height, text, ha="center", va="top", fontsize=7.5, parse_math=False
    )
    axes = figure.add_axes((left + 0.01 * width, bottom, 0.98 * width, (0.7 if tile.text else 0.85) * height))
    if tile.volume is None:
        axes.set(
            xticks=[], yticks=[], facecolor=GREY, position=(left + 0.01 * width, bottom, 0.98 * width, 0.85 * height)
        )
        words.set(color="white", zorder=5, y=bottom + 0.6 * height)
        return
    from nibabel import Nifti1Image
    from nilearn import plotting

    voxels, affine = tile.volume
    voxels = np.pad(voxels, [(0, int(size == 1)) for size in voxels.shape], mode="edge")  # nilearn divides by size - 1
    matrix = np.array(affine)
    centre = matrix[:3, :3] @ ((np.array(voxels.shape) - 1) / 2) + matrix[:3, 3]
    plotting.plot_anat(
        Nifti1Image(voxels, matrix),
        cut_coords=tuple(float(place) for place in centre),
        axes=axes,
        figure=figure,
        vmin=0,
        vmax=1,
        annotate=False,
        draw_cross=False,
        colorbar=False,
        dim=0,
        black_bg=True,
    )


def _small(voxels: np.ndarray, affine: Affine, low: float, high: float) -> Small:
    few, steps = _thinned(voxels)
    seen = (few.astype(np.float32) - low) / (high - low)
    matrix = np.array(affine) @ np.diag([*steps, 1.0])
    return Small(np.nan_to_num(seen).clip(0, 1).astype(np.float32), affine_rows(matrix))


def _thinned(voxels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Every so many of the voxels, and how many along each axis."""
    steps = [-(-size // SIDE) for size in voxels.shape]
    return voxels[tuple(slice(None, None, step) for step in steps)], steps


def _short(title: str) -> str:
    return title if len(title) <= LINE else f"{title[: LINE - 1]}…"

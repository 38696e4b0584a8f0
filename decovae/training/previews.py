"""Pictures of a reconstruction beside its original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decovae.files import write_atomically
from decovae.metrics.slice_features import AXES


def save_preview(volume: torch.Tensor, reconstruction: torch.Tensor, path: Path, *, title: str) -> None:
    """Three planes through the centre: original, reconstruction, and absolute difference.

    Args:
        volume: (1, D, H, W) in RAS axes, intensities shown from 0 to 1.
        reconstruction: like ``volume``.
        path: the PNG to write; it appears whole or not at all.
        title: printed above.
    """
    original = volume[0].float().clamp(0, 1).cpu().numpy()
    rebuilt = reconstruction[0].float().clamp(0, 1).cpu().numpy()
    columns = {"original": original, "reconstruction": rebuilt, "|difference|": np.abs(original - rebuilt)}
    figure = Figure(figsize=(8.6, 9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(AXES), len(columns))
    for row, (plane, axis) in enumerate(AXES.items()):
        for column, (name, image) in enumerate(columns.items()):
            # Rows of the picture run from superior (or anterior) down; the subject's left is on the left.
            slice_ = np.rot90(image.take(image.shape[axis] // 2, axis=axis))
            difference = column == len(columns) - 1
            shown = axes[row, column].imshow(
                slice_, cmap="magma" if difference else "gray", vmin=0, vmax=0.25 if difference else 1
            )
            axes[row, column].set(xticks=[], yticks=[])
            if row == 0:
                axes[row, column].set_title(name, fontsize=10)
            if column == 0:
                axes[row, column].set_ylabel(plane, fontsize=10)
            if difference:
                figure.colorbar(shown, ax=axes[row, column], shrink=0.8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))

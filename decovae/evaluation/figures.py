"""Figures 1b, 2 and 3 of one latent space, or of several side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decovae.evaluation.analysis import Analysis

COLOURS = ("#4b5563", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
"""Of models, in their order; told apart by most colour-blind readers too."""

WIDTH = 3.0
"""Inches a panel."""


def draw_cosine(models: Mapping[str, Analysis]) -> Figure:
    """Figure 2: the absolute cosine similarity of every pair of channels, a matrix a model.

    Args:
        models: title to analysis.

    Raises:
        ValueError: there are no models.
    """
    figure, panels = _panels(models, height=WIDTH + 0.45)
    for panel, (title, analysis) in zip(panels, models.items(), strict=True):
        matrix = np.array(analysis.cosine_matrix)
        names = [f"C{place + 1}" for place in range(analysis.channels)]
        panel.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
        panel.set_xticks(range(analysis.channels), names)
        panel.set_yticks(range(analysis.channels), names)
        panel.set_title(f"{title}\nmean off the diagonal {analysis.cosine_similarity:.3f}", fontsize=9)
        panel.tick_params(length=0, labelsize=8)
        if analysis.channels <= 8:  # more numbers would overlap
            for (row, column), value in np.ndenumerate(matrix):
                ink = "white" if value > 0.55 else "black"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    return figure


def draw_variance(models: Mapping[str, Analysis]) -> Figure:
    """Figure 3: the share of the variance that each principal component explains, a group of bars a component.

    Args and errors as in `draw_cosine`.
    """
    figure = _figure(models, width=max(WIDTH, 1.4 + 1.3 * len(models)) + 1, height=WIDTH)
    panel = figure.subplots()
    most = max(analysis.channels for analysis in models.values())
    width = 0.8 / len(models)
    for place, (title, analysis) in enumerate(models.items()):
        shares = 100 * np.array(analysis.explained_variance)
        left = np.arange(analysis.channels) + width * (place - (len(models) - 1) / 2)
        label = f"{title} (effective rank {analysis.effective_rank:.2f})"
        bars = panel.bar(left, shares, 0.94 * width, color=COLOURS[place % len(COLOURS)], label=label)
        if most * len(models) <= 24:
            panel.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    panel.axhline(100 / most, color="black", linewidth=0.7, linestyle=":")
    panel.set_xticks(range(most), [f"PC{place + 1}" for place in range(most)])
    panel.set_ylabel("explained variance, %")
    panel.margins(y=0.12)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7, frameon=False)
    return figure


def draw_tsne(models: Mapping[str, Analysis]) -> Figure:
    """Figure 1b: t-SNE of voxels' codes, a panel a model, all to one scale.

    Args and errors as in `draw_cosine`; a model without an embedding has an empty panel that says so.
    """
    figure, panels = _panels(models, height=WIDTH + 0.3)
    clouds = [np.array(analysis.tsne.points if analysis.tsne else []).reshape(-1, 2) for analysis in models.values()]
    reach = 1.05 * max([float(np.abs(cloud).max()) for cloud in clouds if len(cloud)], default=1.0)
    for place, (panel, title, cloud) in enumerate(zip(panels, models, clouds, strict=True)):
        panel.set_title(title, fontsize=9)
        panel.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
        panel.scatter(*cloud.T, s=3, alpha=0.5, linewidths=0, color=COLOURS[place % len(COLOURS)])
        if not len(cloud):
            panel.text(0, 0, "no t-SNE", ha="center", va="center", fontsize=9)
    return figure


def png(figure: Figure, *, title: str, dpi: int = 110) -> bytes:
    """A figure as a PNG file's bytes, with its title in the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Title": title})
    return buffer.getvalue()


def _panels(models: Mapping[str, Analysis], *, height: float) -> tuple[Figure, list[Any]]:
    figure = _figure(models, width=WIDTH * len(models), height=height)
    return figure, list(figure.subplots(1, max(1, len(models)), squeeze=False)[0])


def _figure(models: Mapping[str, Analysis], *, width: float, height: float) -> Figure:
    if not models:
        raise ValueError("a figure shows at least one model")
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure

"""Training curves of all models, a chart a measure, from ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from decovae.evaluation.figures import COLOURS
from decovae.report.charts import Line, line_chart
from decovae.report.models import Model

BINS = 60
"""Points of a curve at most: of losses that are logged more often, means over equal stretches are drawn."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption."""

    caption: str
    svg: Markup


CURVES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vae": (
        ("validation/psnr", "PSNR, validation, dB"),
        ("validation/ssim", "SSIM, validation"),
        ("validation/effective_rank", "Effective rank, validation"),
        ("validation/cosine_similarity", "Cosine similarity of channels, validation"),
        ("l1", "L1 loss, training patches"),
        ("kl", "KL loss, training patches"),
        ("deco", "Decorrelation loss, each model its own"),
    ),
    "decoder": (
        ("validation/psnr", "PSNR, validation, dB"),
        ("validation/ssim", "SSIM, validation"),
        ("l1", "L1 loss, training patches"),
    ),
    "flow": (
        ("validation/flow_loss", "Flow loss, held-out subjects"),
        ("validation/flow_loss_training", "Flow loss, training subjects"),
        ("flow_loss", "Flow loss, training batches"),
    ),
}
"""What is drawn of each stage; a measure that no run logged is left out."""


def colour(place: int) -> str:
    """Of the model at this place, as in the figures of the latents."""
    return COLOURS[place % len(COLOURS)]


def training_charts(models: Sequence[Model], stage: str) -> list[Chart]:
    """The curves of one stage, every model in each."""
    charts = []
    for key, caption in CURVES[stage]:
        lines = [
            Line(model.name, colour(place), place, points)
            for place, model in enumerate(models)
            if stage in model.runs and (points := curve(model.runs[stage].metrics, key))
        ]
        if lines:
            name = f"{caption}, over training steps of the {stage}"
            charts.append(Chart(caption, line_chart(lines, name=name, x_label="steps")))
    return charts


def curve(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Step and value of one measure, thinned to `BINS` means."""
    points = [
        (float(record["step"]), float(record[key])) for record in metrics if isinstance(record.get(key), int | float)
    ]
    if len(points) <= BINS:
        return points
    bounds = [round(number * len(points) / BINS) for number in range(BINS + 1)]
    stretches = [points[start:stop] for start, stop in pairwise(bounds)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]

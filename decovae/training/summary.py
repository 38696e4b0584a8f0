"""The end of a run: ``summary.json`` and the table that closes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import decovae
from decovae.files import write_text
from decovae.generation.flow_file import FLOW
from decovae.losses.perceptual import RANDOM
from decovae.models.weights import WEIGHTS_FILE
from decovae.training.config import AdversarialConfig, TrainingConfig
from decovae.training.volumes import describe

RECONSTRUCTION = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "cosine_similarity": ("cosine similarity", "{:.4f}"),
    "pearson": ("mean |Pearson|", "{:.4f}"),
    "effective_rank": ("effective rank", "{:.3f}"),
    "explained_variance": ("explained variance", "{}"),
}

FLOW_LOSSES = {
    "flow_loss": ("flow loss, held-out subjects", "{:.4f}"),
    "flow_loss_training": ("flow loss, training subjects", "{:.4f}"),
    "flow_loss_before_training": ("flow loss before training", "{:.4f}"),
}


def reconstruction_summary(config: AdversarialConfig, validations: list[dict[str, Any]]) -> dict[str, Any]:
    """The last validation's figures, and PSNR at the first.

    ``lpips`` is null where the perceptual features are not the pretrained ones.
    """
    last = validations[-1]
    return {
        **{name: last.get(name) for name in RECONSTRUCTION},
        "psnr_before_training": validations[0]["psnr"],
        "data": describe(config.data),
        "perceptual_network": config.loss.perceptual_network,
    }


def write_summary(folder: Path, config: TrainingConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """Write ``summary.json``: what was run, and ``figures``."""
    summary = {
        "stage": config.stage,
        "steps": config.steps,
        **figures,
        "preset": config.preset,
        "seed": config.seed,
        "version": decovae.__version__,
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """The closing table, and where the pictures are."""
    title = f"Validation set after {summary['steps']} steps"
    if "deco" in summary:
        title += f", deco {summary['deco']}"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, (label, form) in (FLOW_LOSSES if summary.get("stage") == "flow" else RECONSTRUCTION).items():
        table.add_row(label, _shown(summary[name], form))
    console = Console()
    console.print(table)
    lines = [f"Data: {summary['data']}."]
    if summary.get("perceptual_network") == RANDOM:
        lines.append("The perceptual loss used random features, a proxy for LPIPS.")
    weights = FLOW if summary.get("stage") == "flow" else WEIGHTS_FILE
    lines += [f"Pictures: {folder / 'previews'}", f"Weights: {folder / weights}"]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _shown(value: Any, form: str) -> str:
    if isinstance(value, list):
        return " ".join(f"{share:.1%}" for share in value)
    return "not measured (no pretrained features)" if value is None else form.format(value)

"""The end of a run: ``summary.json`` and the table that closes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import decovae
from decovae.losses.perceptual import RANDOM
from decovae.training.config import VAEConfig
from decovae.training.run_folder import write_text

COHORT = "template cohort (simulated from the MNI-152 template; no subject is real)"

ROWS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "cosine_similarity": ("cosine similarity", "{:.4f}"),
    "pearson": ("mean |Pearson|", "{:.4f}"),
    "effective_rank": ("effective rank", "{:.3f}"),
    "explained_variance": ("explained variance", "{}"),
}


def write_summary(folder: Path, config: VAEConfig, validations: list[dict[str, Any]]) -> dict[str, Any]:
    """Write ``summary.json``: the last validation, the first one's PSNR, and what was run.

    ``lpips`` is null where the perceptual features are not the pretrained ones.
    """
    last = validations[-1]
    summary = {
        "steps": config.steps,
        **{name: last.get(name) for name in ROWS},
        "psnr_before_training": validations[0]["psnr"],
        "preset": config.preset,
        "deco": config.deco,
        "seed": config.seed,
        "data": COHORT if config.data.root is None else str(config.data.root),
        "perceptual_network": config.loss.perceptual_network,
        "version": decovae.__version__,
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """The closing table, and where the pictures are."""
    table = Table(title=f"Validation set after {summary['steps']} steps, deco {summary['deco']}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, (label, form) in ROWS.items():
        value = summary[name]
        if isinstance(value, list):
            shown = " ".join(f"{share:.1%}" for share in value)
        elif value is None:
            shown = "not measured (no pretrained features)"
        else:
            shown = form.format(value)
        table.add_row(label, shown)
    console = Console()
    console.print(table)
    lines = [f"Data: {summary['data']}."]
    if summary["perceptual_network"] == RANDOM:
        lines.append("The perceptual loss used random features, a proxy for LPIPS.")
    lines += [f"Pictures: {folder / 'previews'}", f"Weights: {folder / 'autoencoder.safetensors'}"]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)

"""The table that ``decovae evaluate`` closes with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from decovae.evaluation.outputs import EVALUATION
from decovae.metrics.slice_features import PLANES

MEASURES = {
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
}


def print_evaluation(evaluation: Mapping[str, Any], out: Path) -> None:
    """Print what was measured, and what of it is a proxy, on standard output."""
    reconstruction = evaluation["kind"] == "reconstruction"
    count = len(evaluation["volumes"]) if reconstruction else evaluation["number"]
    what = "reconstructed volumes" if reconstruction else f"samples against {evaluation['real_volumes']} real volumes"
    table = Table(title=f"{evaluation['run']}: {count} {what}", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    lines = [f"Data: {evaluation['data']}."]
    if reconstruction:
        for name, (label, form) in MEASURES.items():
            table.add_row(label, _interval(evaluation["measures"][name], form))
        if evaluation["lpips_note"] and evaluation["measures"]["lpips"] is None:
            lines.append(f"No LPIPS: {evaluation['lpips_note']}.")
    first = "r" if reconstruction else "g"
    for name, distance in evaluation["frechet"].items():
        # FID is the paper's name for distances of the features that it used: others' go by another.
        label = f"{first}FD ({name}, proxy)" if distance["proxy"] else f"{first}FID ({name})"
        table.add_row(label, f"{distance['average']:.4g}")
        table.add_row("  " + ", ".join(PLANES), ", ".join(f"{distance[plane]:.4g}" for plane in PLANES))
        lines.append(f"{name}: {distance['title']}" + (f"; {distance['note']}." if distance["note"] else "."))
    for name, close in evaluation.get("fidelity", {}).items():
        table.add_row(f"precision, recall ({name})", f"{close['precision']:.3f}, {close['recall']:.3f}")
        table.add_row(f"density, coverage ({name})", f"{close['density']:.3f}, {close['coverage']:.3f}")
        table.add_row(f"kernel distance ({name})", f"{close['kid']:.4g}")
    if not reconstruction:
        copies = evaluation["memorisation"]
        ratio = "undefined: held-out copies" if copies["ratio"] is None else f"{copies['ratio']:.3f}"
        table.add_row("nearest training volume / held-out's", ratio)
        table.add_row("suspiciously near", ", ".join(copies["suspicious"]) or "none")
        if copies["note"]:
            lines.append(f"Nearness: {copies['note']}.")
    for kind, rows in evaluation["tissue"]["sets"].items():
        means = (sum(row[part] for row in rows) / len(rows) for part in ("csf", "grey", "white"))
        table.add_row(f"CSF, grey, white, ml ({kind})", ", ".join(f"{mean:.0f}" for mean in means))
    if evaluation["partial"]:
        lines.append(f"Partial: {evaluation['partial']}.")
    console = Console()
    console.print(table)
    console.print("\n".join([*lines, f"Written to {out / EVALUATION}"]), soft_wrap=True, highlight=False, markup=False)


def _interval(measure: Mapping[str, float | None] | None, form: str) -> str:
    if measure is None:
        return "not measured"
    mean, low, high = measure["mean"], measure["low"], measure["high"]
    if low is None or high is None or low != low:
        return form.format(mean)
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"

"""The whole chain on the template cohort, from volumes to new volumes, and what the latents do to the flow.

python -m bench.generation [--out FILE] [--runs FOLDER] [--samples N] [--only none|vad] [--note TEXT] [--quick]

For the autoencoder without decorrelation and with VAD, from one seed: train, fine-tune the decoder, encode, train the
flow on draws (with VAD also on means), sample. Each step is a process of its own, timed, and its time kept in
``--runs``, so that an interrupted measurement goes on. Generated volumes are compared with subjects of the cohort that
no run has seen, by the Fréchet distance of features of 2D slices from a SqueezeNet with random weights: a proxy,
comparable within this file and with nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decovae.data.cohort import open_cohort
from decovae.data.patches import load_volume
from decovae.data.template import tissue_maps
from decovae.machine import describe
from decovae.metrics.frechet import FeatureMoments, feature_moments, frechet_distance
from decovae.metrics.slice_features import PLANES, SliceNetwork, random_network, volume_slices

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"none": ("draws",), "vad": ("draws", "mean")}
"""What the flows of each autoencoder are trained on."""

SEED = 42
UNSEEN = range(24, 64)
"""Subjects of the cohort after quickstart's 24."""

QUICK = {
    "vae": "--steps 6 --validate-every 6 --checkpoint-every 6",
    "decoder": "--steps 2 --validate-every 2 --checkpoint-every 2",
    "flow": "--steps 4 --validate-every 4 --checkpoint-every 4 --preview.samples 0",
}
"""Options of ``--quick``, a test of this script."""


class Steps:
    """Commands that are run once: what they took is kept beside what they made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.record = folder / "timings.json"
        self.taken: dict[str, Any] = json.loads(self.record.read_text()) if self.record.exists() else {}

    def run(self, name: str, made: Path | None, *command: str) -> dict[str, Any]:
        """Seconds and peak memory of a command that must succeed; what an interrupted one left is removed first."""
        if name not in self.taken:
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(os.waitstatus_to_exitcode(status))
            self.taken[name] = {
                "seconds": round(time.perf_counter() - start, 1),
                "peak_memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
            }
            self.record.write_text(json.dumps(self.taken, indent=2))
        cost: dict[str, Any] = self.taken[name]
        return cost


def chain(deco: str, runs: Path, samples: int, options: dict[str, str]) -> dict[str, Any]:
    """All steps of one autoencoder; their cost, their summaries, and where the samples lie."""
    steps = Steps(runs / deco)
    vae, decoder = runs / deco / "vae", runs / deco / "decoder"
    extra = {name: options.get(name, "").split() for name in ("vae", "decoder", "flow")}
    costs = {
        "vae": steps.run(
            "vae",
            vae,
            "train/vae.py",
            "quickstart",
            "--deco",
            deco,
            "--seed",
            str(SEED),
            "--out",
            str(vae),
            *extra["vae"],
        ),
        "decoder": steps.run(
            "decoder", decoder, "train/decoder.py", "--vae", str(vae), "--out", str(decoder), *extra["decoder"]
        ),
        "encode": steps.run("encode", decoder / "latents", "-m", "decovae.cli", "encode", str(decoder)),
    }
    flows = {}
    for target in TARGETS[deco]:
        flow = runs / deco / f"flow-{target}"
        name = f"flow-{target}"
        command = ["train/flow.py", "--vae", str(decoder), "--train-on", target, "--out", str(flow), *extra["flow"]]
        costs[name] = steps.run(name, flow, *command)
        sampled = runs / deco / f"samples-{target}"
        sample = ["-m", "decovae.cli", "sample", str(flow), "--out", str(sampled)]
        costs[f"sample-4-{target}"] = steps.run(f"sample-4-{target}", sampled, *sample, "-n", "4")
        costs[f"sample-{target}"] = steps.run(f"sample-{target}", None, *sample, "-n", str(samples))
        flows[target] = {"summary": _summary(flow), "samples": str(sampled)}
    return {
        "deco": deco,
        "vae": _summary(vae),
        "decoder": _summary(decoder),
        "flows": flows,
        "costs": costs,
        "chain_seconds": round(
            sum(costs[name]["seconds"] for name in ("vae", "decoder", "encode", "flow-draws", "sample-4-draws")), 1
        ),
    }


def _summary(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in summary.items() if name not in ("vae", "latents")}


def moments_of(volumes: list[Tensor], network: SliceNetwork) -> dict[str, FeatureMoments]:
    """For each plane, moments of the features of every second slice of the middle half of volumes (D, H, W)."""
    return {
        plane: feature_moments(
            torch.cat([network(volume_slices(volume, plane, every=2, central=0.5)) for volume in volumes])
        )
        for plane in PLANES
    }


def distance(first: dict[str, FeatureMoments], second: dict[str, FeatureMoments]) -> float:
    """Fréchet distance, averaged over planes."""
    return sum(frechet_distance(first[plane], second[plane]) for plane in PLANES) / len(PLANES)


def overlap(volumes: list[Tensor]) -> dict[str, float]:
    """Dice coefficients of the brains in volumes with the template's brain: mean, least and greatest."""
    shape = tuple(volumes[0].shape)
    template = tissue_maps((shape[0], shape[1], shape[2]))[:3].sum(0) > 0.5
    masks = [volume > 0.1 for volume in volumes]
    found = [2 * float((mask & template).sum()) / float(mask.sum() + template.sum()) for mask in masks]
    return {"mean": sum(found) / len(found), "least": min(found), "greatest": max(found)}


def generated(folder: Path) -> list[Tensor]:
    """Sampled volumes, clipped to [0, 1]."""
    import nibabel as nib

    volumes = [np.asarray(nib.load(path).dataobj, dtype=np.float32) for path in sorted(folder.glob("*.nii.gz"))]
    return [torch.from_numpy(volume).clamp(0, 1) for volume in volumes]


def cohort(indices: range, runs: Path, deco: str) -> list[Tensor]:
    """Subjects of the cohort as quickstart sees them, clipped to [0, 1]."""
    from decovae.training.finished import open_vae

    data = open_vae(runs / deco / "vae").config.data
    volumes = open_cohort(indices.stop, seed=data.seed, shape=data.cohort_shape)
    return [load_volume(volumes, index, data.grid)[0].clamp(0, 1) for index in indices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "generation-cpu.json")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "bench-generation", help="folder for the runs")
    parser.add_argument("--samples", type=int, default=20, help="volumes to sample from each flow")
    parser.add_argument("--only", choices=tuple(TARGETS), help="one autoencoder, for example beside the other")
    parser.add_argument("--note", help="what else is to be known of the measurement, such as what ran beside it")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to test this script")
    arguments = parser.parse_args()
    decos = [arguments.only] if arguments.only else list(TARGETS)
    rows = [chain(deco, arguments.runs, arguments.samples, QUICK if arguments.quick else {}) for deco in decos]
    network = random_network()
    unseen = cohort(UNSEEN, arguments.runs, decos[0])
    # The distance depends on how many volumes there are: everything is compared with the same, and as many.
    count = min(arguments.samples, len(unseen) // 2)
    real = moments_of(unseen[:count], network)
    floor = distance(moments_of(unseen[count : 2 * count], network), real)
    for row in rows:
        for flow in row["flows"].values():
            volumes = generated(Path(flow.pop("samples")))
            flow["frechet_random_features"] = distance(moments_of(volumes[:count], network), real)
            flow["dice_with_template"] = overlap(volumes)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "note": arguments.note,
        "seed": SEED,
        "samples": arguments.samples,
        "volumes_compared": count,
        "frechet_random_features_of_other_unseen_subjects": floor,
        "dice_with_template_of_the_unseen": overlap(unseen),
        "chains": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        "| deco | PSNR before → after fine-tuning | flow on | held-out flow loss | Fréchet (random features) | chain |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        for target, flow in row["flows"].items():
            tuned = row["decoder"]
            print(
                f"| {row['deco']} | {tuned['psnr_before_training']:.2f} → {tuned['psnr']:.2f} dB | {target} "
                f"| {flow['summary']['flow_loss']:.4f} | {flow['frechet_random_features']:.3f} "
                f"| {row['chain_seconds']:.0f} s |"
            )


if __name__ == "__main__":
    main()

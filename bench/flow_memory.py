"""What the paper's flow computes and takes at its peak: counted on fake tensors, without a GPU.

python -m bench.flow_memory [--out FILE]

Training is one forward and backward of the flow matching loss on a batch of 4 latents under bf16 autocast, weights,
gradients and Adam's moments included; sampling is one velocity of one latent without gradients. As in `bench.memory`,
numbers are those of PyTorch's allocator on a GPU: no workspaces, no context, no fragmentation, nothing compiled.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from bench.flow_baselines import FlowStep, network
from bench.memory import counting, versions
from decovae.machine import describe
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
from decovae.training.live_memory import SavedForBackward

ROOT = Path(__file__).resolve().parents[1]
TRAINING = (4, 4, 32, 64, 32)
SAMPLING = (1, 4, 32, 64, 32)
VARIANTS = {"MONAI": "monai", "plain torch": "plain", "ours": "ours"}


def made(kind: str) -> torch.nn.Module:
    """A network of the paper's size; ours with the operators that it has on a GPU."""
    if kind == "ours":
        return FlowUNet(FlowUNetConfig(), SAMPLING[1], fused=True)
    return network(kind, FlowUNetConfig(), SAMPLING[1])


def count_training(kind: str) -> dict[str, int]:
    """Bytes kept for backward, operations of the forward, and most bytes alive, in a training step."""
    with counting() as (operations, tracker):
        model = made(kind)
        moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
        latents = torch.empty(TRAINING)
        tracker.reset_peak()
        with torch.autocast("cpu", torch.bfloat16), SavedForBackward(model) as saved:
            loss = FlowStep(model)(latents)
        forward = operations.get_total_flops()
        loss.backward()
        del moments
        return {"saved": saved.activations + saved.weight_casts, "forward": forward, "peak": tracker.peak}


def count_sampling(kind: str) -> dict[str, int]:
    """Operations of one velocity, and most bytes alive."""
    with counting() as (operations, tracker):
        model = made(kind)
        latent = torch.empty(SAMPLING)
        tracker.reset_peak()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(latent, torch.full((1,), 0.5))
        return {"forward": operations.get_total_flops(), "peak": tracker.peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "flow-memory.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, kind in VARIANTS.items():
        rows.append({"implementation": name, "what": "training", "shape": TRAINING, **count_training(kind)})
        rows.append({"implementation": name, "what": "velocity", "shape": SAMPLING, **count_sampling(kind)})
    result = {"date": datetime.date.today().isoformat(), "machine": describe() | versions(), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| | | saved | forward | peak |\n|---|---|---:|---:|---:|")
    for row in rows:
        saved = f"{row['saved'] / 1e9:.2f} GB" if "saved" in row else ""
        counts = f"{row['forward'] / 1e12:.3f} TFLOP | {row['peak'] / 1e9:.2f} GB"
        print(f"| {row['implementation']} | {row['what']} {'×'.join(map(str, row['shape']))} | {saved} | {counts} |")


if __name__ == "__main__":
    main()

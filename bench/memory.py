"""What the autoencoder keeps for backward, computes, and takes at its peak: counted on fake tensors, without a GPU.

python -m bench.memory [--out FILE]

Training is one forward and backward under bf16 autocast with a reconstruction loss, weights, their gradients and
AdamW's moments included in the peak; decoding is one latent without gradients. Numbers are those of a GPU as PyTorch's
allocator hands tensors out, so without cuDNN's workspaces, the CUDA context and fragmentation. Takes minutes, nearly
all of them for MONAI's norms, which are loops. Writes the counts with the versions they are of, and prints tables.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decovae
from bench.block_baselines import monai_autoencoder
from decovae.machine import describe
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.training.live_memory import CUDA_BLOCK, MemoryTracker, SavedForBackward
from decovae.training.pretended_cuda import pretended_cuda

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ((2, 1, 96, 96, 96), (1, 1, 128, 256, 128))
LATENT = (1, 4, 32, 64, 32)

LEGEND = """\
*Saved* is what a forward keeps for backward, each storage once, parameters left out; *weight casts* are autocast's
copies of parameters among it. *Forward* and *both* are multiply-adds times two, without and with the backward. *Peak*
includes weights, gradients, AdamW's moments and the batch. 1 GB is 10⁹ bytes."""


@dataclass(frozen=True)
class Training:
    """Counts of one forward and backward: bytes, and floating-point operations.

    Attributes:
        saved: bytes kept for backward, parameters left out, weight casts not.
        weight_casts: bytes of parameters in autocast's dtype among them.
        forward: operations of the forward.
        both: operations of forward and backward.
        peak: most bytes alive at once.
    """

    saved: int
    weight_casts: int
    forward: int
    both: int
    peak: int


@dataclass(frozen=True)
class Decoding:
    """Counts of decoding without gradients: operations, and most bytes alive at once, weights included."""

    forward: int
    peak: int


class Variant(NamedTuple):
    """An implementation: its network, and whether its weights are laid out channels-last."""

    make: Callable[[], nn.Module]
    channels_last: bool = False


def monai(*, checkpointed: bool = False, float16: bool = False) -> nn.Module:
    """MONAI's autoencoder in MAISI's shape, whole volumes at once."""
    return monai_autoencoder(AutoencoderConfig(), checkpointed=checkpointed, float16=float16)


VARIANTS = {
    "MONAI": Variant(monai),
    "MONAI, use_checkpointing": Variant(lambda: monai(checkpointed=True)),
    "MONAI, norm_float16": Variant(lambda: monai(float16=True)),
    "plain torch, channels-last": Variant(lambda: Autoencoder(memory=None), channels_last=True),
    "ours, balanced": Variant(lambda: Autoencoder(memory="balanced"), channels_last=True),
    "ours, tight": Variant(lambda: Autoencoder(memory="tight"), channels_last=True),
}

SWEEP = {
    "monai-eager": VARIANTS["MONAI"],
    "monai-checkpointed": VARIANTS["MONAI, use_checkpointing"],
    "plain-eager": VARIANTS["plain torch, channels-last"],
    "ours-balanced": VARIANTS["ours, balanced"],
    "ours-tight": VARIANTS["ours, tight"],
}
"""Those that `python -m bench.campaign` sweeps over batch and patch sizes, by their names there."""


def count_training(variant: Variant, shape: tuple[int, ...], *, bf16: bool = True) -> Training:
    """Count one step on a batch (N, 1, D, H, W), under bf16 autocast or in float32."""
    with counting() as (operations, tracker):
        model = _made(variant)
        moments = [torch.zeros_like(parameter) for parameter in model.parameters() for _ in range(2)]
        image = torch.empty(shape)
        tracker.reset_peak()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), SavedForBackward(model) as saved:
            reconstruction = model(image)[0]
        forward = operations.get_total_flops()
        (reconstruction.float() - image).abs().mean().backward()
        del moments
        return Training(
            saved=saved.activations + saved.weight_casts,
            weight_casts=saved.weight_casts,
            forward=forward,
            both=operations.get_total_flops(),
            peak=tracker.peak,
        )


def count_decoding(variant: Variant, shape: tuple[int, ...]) -> Decoding:
    """Count decoding one latent (N, c, d, h, w) under bf16 autocast."""
    with counting() as (operations, tracker):
        model: Any = _made(variant)
        latent = torch.empty(shape)
        tracker.reset_peak()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.decode(latent)
        return Decoding(forward=operations.get_total_flops(), peak=tracker.peak)


def count_full_step(batch: int, patch: tuple[int, int, int]) -> dict[str, Any]:
    """Peak bytes of a whole training step of the preset `paper`, LPIPS, discriminators and optimizers included."""
    from decovae.training.memory import MemoryMode, predict_training_peak
    from decovae.training.presets import PAPER

    modes: tuple[MemoryMode, ...] = ("balanced", "tight", "none")
    data = replace(PAPER.data, patch=patch, batch_size=batch)
    peaks = {memory: predict_training_peak(replace(PAPER, data=data, memory=memory)) for memory in modes}
    return {"shape": [batch, 1, *patch], "peak": peaks}


@contextmanager
def counting() -> Iterator[tuple[FlopCounterMode, MemoryTracker]]:
    """Counters of operations, and of memory as a GPU would hand it out; nothing made inside has content."""
    # The tracker sees an operator first: the counter would take some apart, whose pieces are no allocations on a GPU.
    with (
        pretended_cuda(),
        FlopCounterMode(display=False) as operations,
        MemoryTracker(granularity=CUDA_BLOCK) as tracker,
    ):
        yield operations, tracker


def _made(variant: Variant) -> nn.Module:
    model = variant.make()
    if variant.channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return model


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each shape, and what the columns mean."""
    parts = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        here = [row for row in rows if tuple(row["shape"]) == shape]
        size = "×".join(map(str, shape))
        if "saved" in here[0]:
            lines = [["", "saved", "of it weight casts", "forward", "both", "peak"], ["---", *["---:"] * 5]]
            lines += [
                [
                    row["implementation"],
                    _gigabytes(row["saved"]),
                    _gigabytes(row["weight_casts"]),
                    *(f"{row[name] / 1e12:.3f} TFLOP" for name in ("forward", "both")),
                    _gigabytes(row["peak"]),
                ]
                for row in here
            ]
            parts.append(f"**Training on {size}, bf16**")
        else:
            lines = [["", "forward", "peak"], ["---", "---:", "---:"]]
            lines += [
                [row["implementation"], f"{row['forward'] / 1e12:.3f} TFLOP", _gigabytes(row["peak"])] for row in here
            ]
            parts.append(f"**Decoding {size}, bf16**")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, LEGEND])


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:.3f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", "--json", type=Path, default=ROOT / "bench" / "results" / "memory.json")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in TRAINING:
        for name, variant in VARIANTS.items():
            rows.append({"implementation": name, "shape": shape, **asdict(count_training(variant, shape))})
    for name, variant in VARIANTS.items():
        if "checkpointing" not in name:  # without gradients there is nothing to checkpoint
            rows.append({"implementation": name, "shape": LATENT, **asdict(count_decoding(variant, LATENT))})
    result = {"date": datetime.date.today().isoformat(), "machine": describe() | versions(), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))


def versions() -> dict[str, str]:
    """Of what is compared."""
    return {"decovae": decovae.__version__, "monai": importlib.metadata.version("monai")}


if __name__ == "__main__":
    main()

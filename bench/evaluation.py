"""What measuring a reconstruction costs beside decoding it.

python -m bench.evaluation [--size paper|quickstart] [--device cpu|cuda] [--rounds N] [--out FILE]

One volume in the GPU's memory, or in the CPU's: decoding its latent, then everything that `decovae evaluate` measures
of the result. Features of the original are not in it: they are read from the cache for every autoencoder after the
first. Networks have random weights, which cost what trained ones do. Medians of several rounds after one that is not
counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import synchronise
from decovae.data.cohort import open_cohort
from decovae.data.patches import load_volume
from decovae.data.volumes import Shape
from decovae.losses.perceptual import PerceptualLoss
from decovae.machine import describe
from decovae.metrics.reconstruction import lpips, psnr, ssim_and_ms_ssim
from decovae.metrics.slice_features import PLANES, SliceNetwork, radimagenet_network, random_network, volume_slices
from decovae.metrics.tissue import tissue_volumes
from decovae.models.autoencoder import Autoencoder
from decovae.training.presets import PAPER, QUICKSTART

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"paper": PAPER, "quickstart": QUICKSTART}
TARGET = 0.3
"""Of the time of decoding."""


def radimagenet_shaped() -> SliceNetwork:
    """A ResNet-50 with random weights in the place of RadImageNet's: the same arithmetic."""
    from torchvision.models import resnet50

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.pt"
        torch.save(resnet50(weights=None).state_dict(), path)
        return radimagenet_network(path)


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Seconds of a call until the device is done."""
    seconds = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        run()
        synchronise(device)
        if number or rounds == 1:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def parts(grid: Shape, autoencoder: Autoencoder, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    bf16 = device.type == "cuda"
    volumes = open_cohort(2, seed=0, shape=grid)
    original, other = (load_volume(volumes, index, grid).clamp(0, 1).to(device) for index in (0, 1))
    latent = torch.randn(1, autoencoder.config.latent_channels, *(size // 4 for size in grid), device=device)
    perceptual = PerceptualLoss(load=False).to(device)  # pretrained features cost the same
    networks = {"random features": random_network().to(device), "ResNet-50 features": radimagenet_shaped().to(device)}

    def decode() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return autoencoder.decode(latent)

    def features(network: SliceNetwork) -> Callable[[], object]:
        return lambda: [network(volume_slices(other, plane)) for plane in PLANES]

    return {
        "decoding": decode,
        "PSNR": lambda: psnr(other, original),
        "SSIM and MS-SSIM": lambda: ssim_and_ms_ssim(other, original),
        "LPIPS": lambda: lpips(other, original, perceptual),
        **{name: features(network) for name, network in networks.items()},
        "tissue, on the CPU": lambda: tissue_volumes(other[0].cpu().numpy(), voxel_ml=0.001),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="paper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="1 counts the first call")
    parser.add_argument("--out", type=Path, help="JSON; by default bench/results/evaluation-DEVICE.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = SIZES[arguments.size]
    autoencoder = Autoencoder(config.model).to(device).eval().requires_grad_(False)
    with torch.no_grad():
        seconds = {
            name: median_seconds(run, device, arguments.rounds)
            for name, run in parts(config.data.grid, autoencoder, device).items()
        }
    decoding = seconds.pop("decoding")
    rest = {
        network: sum(value for name, value in seconds.items() if not name.endswith("features") or name == network)
        for network in ("random features", "ResNet-50 features")
    }
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "device": device.type,
        "grid": config.data.grid,
        "rounds": arguments.rounds,
        "decoding_seconds": round(decoding, 4),
        "measuring_seconds": {name: round(value, 4) for name, value in seconds.items()},
        "measuring_over_decoding": {name: round(value / decoding, 4) for name, value in rest.items()},
        "target": TARGET,
    }
    out = arguments.out or ROOT / "bench" / "results" / f"evaluation-{device.type}.json"
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

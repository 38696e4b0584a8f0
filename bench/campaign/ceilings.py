"""What the machine reaches at most: copying, matrix products and convolutions, in a process of its own.

    python -m bench.campaign.ceilings --out FILE

How a rate is measured says `decovae.rates`, by which training measures that of matrix products too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from decovae.files import write_text
from decovae.rates import MATRIX_SIZE, as_dtype, matrix_flops_per_second, seconds_of_a_call

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MATRIX_DTYPES = {"cuda": ("bfloat16", "float16", "tf32", "float32"), "cpu": ("float32",)}
CONVOLUTIONS = {
    "cuda": ((2, 64, 96, 96, 96), (2, 256, 24, 24, 24)),
    "cpu": ((1, 16, 16, 16, 16),),
}
"""Shapes (N, C, D, H, W) of what goes in, and comes out, of kernels of 3³."""
CONVOLUTION_DTYPES = {"cuda": ("bfloat16", "tf32"), "cpu": ("float32",)}


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of_a_call(lambda: target.copy_(source), device)


def convolution_flops_per_second(shape: Sequence[int], dtype: str, device: torch.device) -> float:
    """Operations a second of a convolution forward that keeps the shape, channels-last; dtypes as for products."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    channels = shape[1]
    kind: dict[str, Any] = {"device": device, "dtype": as_dtype(dtype)}
    x = torch.randn(*shape, **kind).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, channels, 3, 3, 3, **kind).contiguous(memory_format=torch.channels_last_3d)
    flops = 2 * math.prod(shape) * channels * 27
    return flops / seconds_of_a_call(lambda: F.conv3d(x, weight, padding=1), device)


@torch.no_grad()
def measure(device: torch.device) -> dict[str, Any]:
    """All ceilings, and at which sizes; a convolution's rate is the highest of its shapes'."""
    kind = device.type
    convolutions: list[dict[str, Any]] = [
        {"shape": list(shape), "dtype": dtype, "flops_per_second": convolution_flops_per_second(shape, dtype, device)}
        for dtype in CONVOLUTION_DTYPES[kind]
        for shape in CONVOLUTIONS[kind]
    ]
    highest: dict[str, float] = {}
    for found in convolutions:
        highest[found["dtype"]] = max(highest.get(found["dtype"], 0.0), found["flops_per_second"])
    return {
        "copy_bytes_per_second": copy_bytes_per_second(device),
        "copy_bytes": COPY_BYTES[kind],
        "matrix_flops_per_second": {dtype: matrix_flops_per_second(dtype, device) for dtype in MATRIX_DTYPES[kind]},
        "matrix_size": MATRIX_SIZE[kind],
        "convolution_flops_per_second": highest,
        "convolutions": convolutions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_text(arguments.out, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

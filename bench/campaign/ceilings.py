"""What the machine reaches at most: copying, matrix products and convolutions, in a process of its own.

    python -m bench.campaign.ceilings --out FILE

Random data, as a GPU's clocks depend on the bits that change. Calls follow each other without waiting, so that no
launch is in a time; the median of many batches of calls, each until the device is done.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.measure import synchronise
from decovae.files import write_text

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
MATRIX_DTYPES = {"cuda": ("bfloat16", "float16", "tf32", "float32"), "cpu": ("float32",)}
CONVOLUTIONS = {
    "cuda": ((2, 64, 96, 96, 96), (2, 256, 24, 24, 24)),
    "cpu": ((1, 16, 16, 16, 16),),
}
"""Shapes (N, C, D, H, W) of what goes in, and comes out, of kernels of 3³."""
CONVOLUTION_DTYPES = {"cuda": ("bfloat16", "tf32"), "cpu": ("float32",)}

BATCHES = 9
BATCH_SECONDS = {"cuda": 0.05, "cpu": 0.02}
"""How long the calls between two waits take, at least."""


def seconds_of_a_call(run: Callable[[], object], device: torch.device) -> float:
    """The median over batches of back-to-back calls."""
    for _ in range(3):  # what libraries set up and try out, pages that are touched first, clocks that rise
        run()
    synchronise(device)
    calls = 1
    while (taken := _seconds(run, calls, device)) < BATCH_SECONDS[device.type]:
        calls = max(2 * calls, math.ceil(calls * BATCH_SECONDS[device.type] / max(taken, 1e-9)))
    return statistics.median(_seconds(run, calls, device) for _ in range(BATCHES)) / calls


def _seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronise(device)
    return time.perf_counter() - start


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of_a_call(lambda: target.copy_(source), device)


def matrix_flops_per_second(dtype: str, device: torch.device) -> float:
    """Operations a second of a large square product; "tf32" is float32 whose products may be TensorFloat-32."""
    size = MATRIX_SIZE[device.type]
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    left, right = (torch.randn(size, size, device=device).to(_torch_dtype(dtype)) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / seconds_of_a_call(lambda: torch.mm(left, right, out=product), device)


def convolution_flops_per_second(shape: Sequence[int], dtype: str, device: torch.device) -> float:
    """Operations a second of a convolution forward that keeps the shape, channels-last; dtypes as for products."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    channels = shape[1]
    kind: dict[str, Any] = {"device": device, "dtype": _torch_dtype(dtype)}
    x = torch.randn(*shape, **kind).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(channels, channels, 3, 3, 3, **kind).contiguous(memory_format=torch.channels_last_3d)
    flops = 2 * math.prod(shape) * channels * 27
    return flops / seconds_of_a_call(lambda: F.conv3d(x, weight, padding=1), device)


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    return dtype


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

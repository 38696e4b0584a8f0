"""How fast a device is at calls that follow each other without waiting, and at matrix products above all.

Random data, as a GPU's clocks depend on the bits that change; the median of several batches of calls, each until the
device is done, so that no launch is in a time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the matrices that are multiplied."""

BATCHES = 9
BATCH_SECONDS = {"cuda": 0.05, "cpu": 0.02}
"""How long the calls between two waits take, at least."""


def synchronise(device: torch.device) -> None:
    """Wait until everything that was launched on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


@torch.no_grad()
def matrix_flops_per_second(dtype: str, device: torch.device) -> float:
    """Operations a second of a large square product; "tf32" is float32 whose products may be TensorFloat-32.

    Takes half a second, and on a GPU 0.8 GB or less for as long. torch's settings and random state are afterwards what
    they were.
    """
    size = MATRIX_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        left, right = (torch.randn(size, size, device=device, generator=generator).to(as_dtype(dtype)) for _ in "lr")
        product = torch.empty_like(left)
        return 2 * size**3 / seconds_of_a_call(lambda: torch.mm(left, right, out=product), device)
    finally:
        torch.set_float32_matmul_precision(precision)


def as_dtype(name: str) -> torch.dtype:
    """torch's dtype of that name, "tf32" being float32."""
    dtype: torch.dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    return dtype

"""The losses against plain torch, eager and compiled, and against lightly's VICReg terms.

    pytest bench --benchmark-only --benchmark-json FILE, then python -m bench.table FILE

A group is one loss at one shape, dtype and direction; its rows are the ones to compare. The gradient is taken with
respect to the latent, as the encoder's backward needs it. A time is one call from Python until the device is done, with
its launches, as a training step sees it. Every call of a row reads the same latent: the two smaller ones stay in a
CPU's or a GPU's last-level cache or near it, for every implementation alike; the largest is far beyond any.

Equal work is not equal accuracy: at the largest shape the plain formulations sum 57 million products in float32, and
on the CPU that was tried their variances came out 2.5 % too small.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import decovae
from bench import baselines, measure
from bench.baselines import Formulation, Loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# What the paper's training has on one GPU (a batch of two 96³ patches), eight whole latents, and 906 MB in float32.
PAPER, WHOLE, LARGE = "2x4x24x24x24", "8x4x32x64x32", "1x4x384x384x384"

LOSSES: dict[str, tuple[Loss, Callable[[torch.Tensor, Formulation], torch.Tensor]]] = {
    "VAD": (decovae.vad_loss, baselines.vad),
    "SID": (decovae.sid_loss, baselines.sid),
    "COV": (decovae.covariance_loss, baselines.covariance),
    "VAR": (decovae.variance_loss, baselines.variance),
}

# The most that a row holds at once, as a multiple of μ: lightly's backward holds 5, making the next latent as many.
MEMORY_FACTOR = 6


def implementations(loss: str, shape: str, dtype: str) -> list[str]:
    """What is worth its time: VAD with every peer; SID, COV and VAR move the same bytes, so fewer where it is slow."""
    on_cpu = DEVICE.type == "cpu"
    if loss in ("COV", "VAR"):
        return ["ours", "channel-rows-eager"] if dtype == "float32" and shape != LARGE else []
    if on_cpu and loss == "SID" and shape == LARGE:
        return ["ours", "channel-rows-eager"]
    if on_cpu and dtype == "bfloat16":
        return ["ours", "channel-rows-eager", "sample-rows-eager"]
    names = [f"{rows}-{mode}" for rows in baselines.FORMULATIONS for mode in ("eager", "compiled")]
    return ["ours", *names, *(["lightly"] if loss == "VAD" else [])]


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    for shape in (PAPER, WHOLE, LARGE):
        for dtype in ("float32", "bfloat16"):
            for loss in LOSSES:
                for direction in ("forward", "forward+backward"):
                    for name in implementations(loss, shape, dtype):
                        yield shape, dtype, loss, direction, name


@functools.lru_cache(maxsize=1)  # rows of one shape and dtype follow each other
def latent(shape: str, dtype: str) -> torch.Tensor:
    size = [int(length) for length in shape.split("x")]
    mu = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return mu.to(DEVICE, getattr(torch, dtype))


def implementation(name: str, loss: str) -> Loss:
    ours, plain = LOSSES[loss]
    if name == "ours":
        return ours
    if name == "lightly":
        pytest.importorskip("lightly", reason="needs lightly: pip install -e '.[bench]'")
        return baselines.lightly_terms()
    flattening, _, mode = name.rpartition("-")
    formulation = baselines.FORMULATIONS[flattening]

    def function(mu: torch.Tensor) -> torch.Tensor:
        return plain(mu, formulation)

    if mode == "eager":
        return function
    if DEVICE.type == "cpu" and not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")
    torch._dynamo.reset()
    compiled: Loss = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def skip_what_is_too_much(shape: str, dtype: str, name: str, timed: bool) -> None:
    size = math.prod(int(length) for length in shape.split("x")) * getattr(torch, dtype).itemsize
    if not timed and shape == LARGE:
        pytest.skip(f"{size / 1e6:.0f} MB of μ: only run to be timed")
    if not timed and shape != PAPER and name.endswith("compiled"):
        pytest.skip(f"compiled for {PAPER} already: another shape is only compiled to be timed")
    available = measure.available_memory(DEVICE)
    needed = MEMORY_FACTOR * size
    if available is not None and available < needed:
        pytest.skip(f"needs {needed / 1e9:.1f} GB on {DEVICE.type}, {available / 1e9:.1f} GB are available")


@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
@pytest.mark.parametrize(("shape", "dtype", "loss", "direction", "name"), list(rows()))
def test_loss(benchmark: Any, shape: str, dtype: str, loss: str, direction: str, name: str) -> None:
    skip_what_is_too_much(shape, dtype, name, timed=benchmark.enabled)
    function = implementation(name, loss)
    mu = latent(shape, dtype).detach().requires_grad_(direction != "forward")

    def run() -> Any:
        value = function(mu)
        return value if direction == "forward" else torch.autograd.grad(value, mu)

    def run_to_the_end() -> None:
        run()
        measure.synchronise(DEVICE)

    run_to_the_end()  # compiles, tunes, fills caches
    benchmark.group = f"{loss} {shape} {dtype} {direction}"
    on_cpu = DEVICE.type == "cpu"
    if on_cpu and shape == LARGE:
        benchmark.pedantic(run_to_the_end, rounds=3)  # seconds a call
    else:
        benchmark(run_to_the_end)
    benchmark.extra_info |= {
        "implementation": name,
        "loss": loss,
        "shape": shape,
        "dtype": dtype,
        "direction": direction,
        "bytes_moved_floor": measure.bytes_moved_floor(mu, direction),
        "copy_bytes_per_second": measure.copy_bandwidth(mu.numel(), mu.dtype, DEVICE),
        "launches": None if on_cpu else measure.launches(run),
        # Generated code bypasses the dispatcher, and compilation refuses to run under a mode that would watch it.
        "operators": measure.operators(run) if on_cpu and not name.endswith("compiled") else None,
        "peak_extra_bytes": measure.peak_extra_bytes(run, DEVICE, 0 if direction == "forward" else mu.nbytes),
    }

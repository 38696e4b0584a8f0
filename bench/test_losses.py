"""The four losses against the plain eager formulation and the same under torch.compile.

    pytest bench --benchmark-only

A group is one loss at one shape, dtype and direction; its rows are the ones to compare. The gradient is taken with
respect to the latent, as the encoder's backward needs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

import decovae
from bench import baselines

Loss = Callable[[torch.Tensor], torch.Tensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# What the paper's training has on one GPU (a batch of two 96³ patches), and eight whole latents.
SHAPES = [(2, 4, 24, 24, 24), (8, 4, 32, 64, 32)]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]

LOSSES: dict[str, tuple[Loss, Loss]] = {
    "SID": (decovae.sid_loss, baselines.sid),
    "COV": (decovae.covariance_loss, baselines.covariance),
    "VAR": (decovae.variance_loss, baselines.variance),
    "VAD": (decovae.vad_loss, baselines.vad),
}


def formulation(kind: str, ours: Loss, plain: Loss) -> Loss:
    if kind == "ours":
        return ours
    if kind == "eager":
        return plain
    if DEVICE.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")
    torch._dynamo.reset()
    compiled: Loss = torch.compile(plain, fullgraph=True, dynamic=False)
    return compiled


def measure(benchmark: Any, run: Callable[[], Any]) -> None:
    """Time `run` until its work is done on the device; the first calls compile and are not counted."""

    def synchronised() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        synchronised()
    benchmark(synchronised)


@pytest.mark.parametrize("kind", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(benchmark: Any, loss: str, shape: tuple[int, ...], dtype: torch.dtype, direction: str, kind: str) -> None:
    benchmark.group = f"{loss} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {direction}"
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_(direction != "forward")
    function = formulation(kind, *LOSSES[loss])

    if direction == "forward":
        measure(benchmark, lambda: function(mu))
        return
    measure(benchmark, lambda: torch.autograd.grad(function(mu), mu))

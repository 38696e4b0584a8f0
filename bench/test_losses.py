"""The losses against plain torch, eager and compiled, and against lightly's VICReg terms.

    pytest bench/test_losses.py

A case is one loss at one shape, dtype and direction; its rows are the ones to compare. The gradient is taken with
respect to the latent, as the encoder's backward needs it. A time is one call from Python until the device is done, with
its launches, as a training step sees it. Every call of a row reads the same latent: the two smaller ones stay in a
CPU's or a GPU's last-level cache or near it, for every implementation alike; the largest is far beyond any.

Equal work is not equal accuracy: at the largest shape the plain formulations sum 57 million products in float32, and
on the CPU that was tried their variances came out 2.5 % too small. Sizes are those of `bench.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import decovae
from bench import baselines, measure
from bench.baselines import Formulation, Loss
from bench.fixtures import clean_slate
from bench.floors import Floor
from bench.row import Row, Work, measured
from bench.scale import DEVICE, ON_CPU, SCALE, at_scale

__all__ = ["clean_slate"]

Shape = tuple[int, ...]

# What the paper's training has on one GPU (a batch of two 96³ patches), eight whole latents, and 906 MB in float32 (on
# two cores 268 MB, which is beyond their caches too).
SHAPES: dict[str, Shape] = at_scale(
    gpu={"paper": (2, 4, 24, 24, 24), "whole": (8, 4, 32, 64, 32), "large": (1, 4, 384, 384, 384)},
    cpu={"paper": (2, 4, 24, 24, 24), "whole": (8, 4, 32, 64, 32), "large": (1, 4, 256, 256, 256)},
    tiny={"paper": (2, 4, 8, 8, 8), "whole": (8, 4, 8, 16, 8)},
)

LOSSES: dict[str, tuple[Loss, Callable[[torch.Tensor, Formulation], torch.Tensor]]] = {
    "VAD": (decovae.vad_loss, baselines.vad),
    "SID": (decovae.sid_loss, baselines.sid),
    "COV": (decovae.covariance_loss, baselines.covariance),
    "VAR": (decovae.variance_loss, baselines.variance),
}

EAGER = ["ours", *(f"{rows}-eager" for rows in baselines.FORMULATIONS)]
COMPILED = [f"{rows}-compiled" for rows in baselines.FORMULATIONS]

# The most that a row holds at once, as a multiple of μ: lightly's backward holds 5, making the next latent as many.
MEMORY_FACTOR = 6


def implementations(loss: str, shape: str, dtype: str, direction: str) -> list[str]:
    """What is worth its time: VAD with every peer; SID, COV and VAR move the same bytes, so fewer where it is slow."""
    if loss in ("COV", "VAR"):
        return EAGER[:2] if dtype == "float32" and shape != "large" else []
    peers = ["lightly"] if loss == "VAD" else []
    if SCALE == "gpu":
        return [*EAGER, *COMPILED, *peers]
    if SCALE == "tiny":
        proof = loss == "VAD" and shape == "paper" and dtype == "float32" and direction == "forward+backward"
        return [*EAGER, *(COMPILED[:1] if proof else []), *peers]
    if dtype == "bfloat16":
        return EAGER
    if shape == "large" and loss == "SID":
        return EAGER[:2]
    return [*EAGER, *COMPILED, *peers]


def rows() -> Iterator[tuple[str, str, str, str, str]]:
    for shape in SHAPES:
        for dtype in ("float32", "bfloat16"):
            for loss in LOSSES:
                for direction in ("forward", "forward+backward"):
                    for name in implementations(loss, shape, dtype, direction):
                        yield shape, dtype, loss, direction, name


def latent(row: Row) -> torch.Tensor:
    """A latent mean on the device, the same for all rows of a shape and dtype."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    mu = torch.randn(row.shape, generator=generator, device=DEVICE).to(row.dtype)
    return mu.requires_grad_(row.backward)


def implementation(name: str, loss: str) -> Loss:
    ours, plain = LOSSES[loss]
    if name == "ours":
        return ours
    if name == "lightly":
        return baselines.lightly_terms()
    flattening, _, mode = name.rpartition("-")
    formulation = baselines.FORMULATIONS[flattening]

    def function(mu: torch.Tensor) -> torch.Tensor:
        return plain(mu, formulation)

    return torch.compile(function, fullgraph=True, dynamic=False) if mode == "compiled" else function


def skip_what_is_too_much(mu_bytes: int) -> None:
    available = measure.available_memory(DEVICE)
    needed = MEMORY_FACTOR * mu_bytes
    if available is not None and available < needed:
        pytest.skip(
            f"does not fit: needs {needed / 1e9:.1f} GB on {DEVICE.type}, {available / 1e9:.1f} GB are available"
        )


@pytest.mark.parametrize(("shape", "dtype", "loss", "direction", "name"), list(rows()))
def test_loss(benchmark: Any, shape: str, dtype: str, loss: str, direction: str, name: str) -> None:
    row = Row("losses", loss, name, SHAPES[shape], getattr(torch, dtype), direction, math.prod(SHAPES[shape]))
    mu_bytes = row.features * row.dtype.itemsize

    def build() -> Work:
        skip_what_is_too_much(mu_bytes)
        function, mu = implementation(name, loss), latent(row)

        def run() -> Any:
            value = function(mu)
            return torch.autograd.grad(value, mu) if row.backward else value

        return Work(
            run,
            result_bytes=mu_bytes if row.backward else 0,
            held=mu_bytes,
            # Generated code bypasses the dispatcher, and compilation refuses to run under a mode that would watch it.
            count=None if row.compiled else run,
            launches=True,
        )

    floor = Floor(measure.bytes_moved_floor(mu_bytes, direction))
    rounds = 3 if ON_CPU and shape == "large" else None
    measured(benchmark, row, floor, build, rounds=rounds)

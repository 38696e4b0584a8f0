"""The autoencoder's training step over batch and patch, to the limit of the card's memory.

    pytest bench/test_sweep.py

Forward and backward as in bench/test_blocks.py, with AdamW's moments allocated, so that memory is that of training:
``training_bytes`` is its peak with parameters, gradients, moments and the batch. Patches have their names from scale
gpu, where they are cubes of so many voxels an edge, and a whole 128×256×128 volume; elsewhere they are a quarter. Where
an implementation did not fit, what has more voxels does not begin. Calls are few, as rows are many.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench import block_baselines
from bench.fixtures import as_in_training, clean_slate
from bench.floors import Counting, Floor, Shape
from bench.row import Row, Work, measured, module_work, own_layout
from bench.scale import DEVICE, DTYPE, at_scale
from bench.test_blocks import CONFIG
from decovae.models.autoencoder import Autoencoder

__all__ = ["as_in_training", "clean_slate"]

CUBES = (64, 96, 128, 160, 192)
FRACTION = at_scale(gpu=1, cpu=4, tiny=4)
PATCHES: dict[str, Shape] = {f"patch{edge}": (edge // FRACTION,) * 3 for edge in CUBES}
PATCHES["volume"] = (128 // FRACTION, 256 // FRACTION, 128 // FRACTION)
IMPLEMENTATIONS = ("ours-balanced", "ours-tight", "plain-eager", "monai-eager", "monai-checkpointed")
BATCHES = at_scale(gpu=(1, 2, 4), cpu=(1, 2), tiny=(1,))
SWEPT = at_scale(gpu=tuple(PATCHES), cpu=("patch64", "patch96", "patch128"), tiny=("patch64", "patch96"))
ROUNDS = at_scale(gpu=3, cpu=2, tiny=1)

did_not_fit: dict[str, Shape] = {}
"""Of each implementation the shape with the fewest voxels that did not fit, in this process."""


def rows() -> Iterator[tuple[str, int, str]]:
    """By implementation the smaller before the larger, so that the limit is met once."""
    sizes = [(patch, batch) for patch in SWEPT for batch in BATCHES]
    for name in IMPLEMENTATIONS:
        for patch, batch in sorted(sizes, key=lambda size: size[1] * math.prod(PATCHES[size[0]])):
            yield patch, batch, name


@pytest.mark.parametrize(("patch", "batch", "name"), list(rows()))
def test_training(benchmark: Any, patch: str, batch: int, name: str) -> None:
    image = (batch, 1, *PATCHES[patch])
    features = CONFIG.channels[0] * math.prod(image)
    row = Row("sweep", "sweep", name, image, DTYPE, "forward+backward", features, own_layout(name))
    benchmark.extra_info |= {"batch": batch, "patch": "x".join(map(str, PATCHES[patch]))}

    def build() -> Work:
        smaller = did_not_fit.get(name)
        if smaller is not None and math.prod(smaller) < math.prod(image):
            pytest.skip(f"does not fit: already {'×'.join(map(str, smaller))} did not")
        module = row.placed(block_baselines.training_step(name, CONFIG))
        moments = [torch.zeros_like(parameter) for parameter in module.parameters() for _ in range(2)]
        work = module_work(row, module, torch.rand(image, device=DEVICE), beside=moments)
        return dataclasses.replace(work, count=None)  # counted once in bench/test_blocks.py, and not for free

    def exhausted() -> None:
        smallest = did_not_fit.get(name, image)
        did_not_fit[name] = min(smallest, image, key=math.prod)

    noted = measured(benchmark, row, floor(image), build, rounds=ROUNDS, exhausted=exhausted)
    if noted is not None:
        noted["training_bytes"] = noted["peak_bytes"]


@functools.cache
def floor(image: Shape) -> Floor:
    with torch.device("meta"):
        return Counting(DTYPE.itemsize, backward=True).autoencoder(Autoencoder(CONFIG, memory=None), image)

"""The whole training step of the paper's autoencoder: generator and discriminators, all losses, clipping and AdamW.

    pytest bench/test_step.py

"ours" goes through this project's own loop and stage, as ``train/vae.py paper`` calls them after the adversarial
warm-up; "plain" is the same with torch's own operators in the blocks (``--memory none``); "compiled" is ``--compile
on``. MONAI's rows are what its users write of its parts; `bench.step_baselines` says what all do, and what is left out:
loading data. At scale gpu the batch is two 96³ patches, or one whole volume, in bfloat16 by autocast; elsewhere it is
small and float32, and nothing is compiled, which takes minutes there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import step_baselines
from bench.fixtures import as_in_training, clean_slate
from bench.row import Row, Work, measured, own_layout
from bench.scale import DEVICE, DTYPE, PRECISION, at_scale
from bench.test_blocks import CONFIG, FLOAT16
from decovae.training.presets import PAPER

__all__ = ["as_in_training", "clean_slate"]

CONFIGURATION = replace(PAPER, model=CONFIG, precision=PRECISION)

SHAPES: dict[str, tuple[int, ...]] = at_scale(
    gpu={"paper": (2, 1, 96, 96, 96), "volume": (1, 1, 128, 256, 128)},
    cpu={"paper": (2, 1, 32, 32, 32)},
    tiny={"paper": (2, 1, 24, 24, 24)},
)
EAGER = ["ours-balanced", "ours-tight", "plain-eager", "monai-eager", *FLOAT16, "monai-checkpointed"]
COMPILED = at_scale(gpu=["ours-balanced-compiled", "plain-compiled"], cpu=[], tiny=[])


@pytest.mark.parametrize("name", [*EAGER, *COMPILED])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_step(benchmark: Any, shape: str, name: str) -> None:
    size = SHAPES[shape]
    features = CONFIG.channels[0] * math.prod(size)
    row = Row("training", "whole training step", name, size, DTYPE, "step", features, own_layout(name))

    def build() -> Work:
        step = step_baselines.step(name, CONFIGURATION, torch.rand(size, device=DEVICE))
        step()  # the optimizers' moments exist from here on
        return Work(step, result_bytes=0, held=step_baselines.held_bytes(step), count=None if row.compiled else step)

    floor = step_baselines.floor(CONFIGURATION, size, itemsize=DTYPE.itemsize)
    noted = measured(benchmark, row, floor, build, seconds=2)
    if noted is not None:
        noted["training_bytes"] = noted["peak_bytes"]

"""The flow's training step and a sampling of 30 steps against MONAI's U-Net, eager and compiled.

    pytest bench/test_flow.py

Rows are as in bench/test_blocks.py. At scale gpu the network and the latents are the paper's, in bfloat16 by autocast
with float32 parameters, a compiled sampling with CUDA graphs, whose memory is what torch's allocator reserves; at scale
cpu they are of `quickstart`'s size, in float32, the latents padded already, which MONAI's network does not do, and
nothing is compiled, which takes minutes there. A training step ends with the gradients; the optimizer, the same for
all, is left out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from bench import flow_baselines
from bench.fixtures import as_in_training, clean_slate
from bench.floors import Floor
from bench.flow_baselines import FlowStep, Sampling
from bench.row import Row, Work, compiled, measured, module_work, own_layout
from bench.scale import DEVICE, DTYPE, ON_CPU, at_scale
from decovae.models.flow_unet import FlowUNetConfig

__all__ = ["as_in_training", "clean_slate"]

CONFIG = at_scale(
    gpu=FlowUNetConfig(),
    cpu=FlowUNetConfig(
        channels=(16, 32, 64), attention=(False, False, True), residual_blocks=1, head_channels=32, groups=16
    ),
    tiny=FlowUNetConfig(channels=(8, 16), attention=(False, True), residual_blocks=1, head_channels=8, groups=4),
)
CHANNELS = 4
LATENT = at_scale(gpu=(32, 64, 32), cpu=(16, 20, 16), tiny=(4, 8, 4))
TRAINING_BATCH = 4
STEPS = at_scale(gpu=30, cpu=30, tiny=3)

EAGER = at_scale(
    gpu=["ours", "plain-eager", "monai-eager", "monai-channels-last-eager"],
    # On the CPU this project's network has no fused operators: "plain" is "ours".
    cpu=["ours", "monai-eager"],
    tiny=["ours", "monai-eager", "monai-channels-last-eager"],
)
COMPILED = at_scale(gpu=["ours-compiled", "plain-compiled", "monai-compiled"], cpu=[], tiny=[])


def flow_row(subject: str, name: str, batch: int, direction: str) -> Row:
    shape = (batch, CHANNELS, *LATENT)
    features = batch * CONFIG.channels[0] * math.prod(LATENT)
    return Row("generation", subject, name, shape, DTYPE, direction, features, own_layout(name))


def network(row: Row) -> nn.Module:
    return row.placed(flow_baselines.network(row.name.partition("-")[0], CONFIG, CHANNELS))


def floor(row: Row, evaluations: int = 1) -> Floor:
    once = flow_baselines.floor(CONFIG, row.shape, itemsize=row.dtype.itemsize, backward=row.backward)
    return Floor(evaluations * once.bytes_moved, evaluations * once.flops)


@pytest.mark.parametrize("name", [*EAGER, *COMPILED])
def test_training_step(benchmark: Any, name: str) -> None:
    row = flow_row("training step of the flow", name, TRAINING_BATCH, "forward+backward")

    def build() -> Work:
        step: nn.Module = FlowStep(network(row))
        if row.compiled:
            step = compiled(step, fullgraph=not name.startswith("monai"))
        return module_work(row, step, torch.randn(row.shape, device=DEVICE))

    measured(benchmark, row, floor(row), build, seconds=2)


@pytest.mark.parametrize("name", [*EAGER, *COMPILED])
def test_sampling(benchmark: Any, name: str) -> None:
    row = flow_row(f"sampling, {STEPS} steps", name, 1, "forward")

    def build() -> Work:
        model = network(row)
        if row.compiled:
            mode = None if ON_CPU else "reduce-overhead"
            model = torch.compile(model, mode=mode, dynamic=False)  # type: ignore[assignment]
        work = module_work(row, Sampling(model, STEPS), torch.randn(row.shape, device=DEVICE))
        return dataclasses.replace(work, graphs=row.compiled and not ON_CPU)

    measured(benchmark, row, floor(row, STEPS), build, seconds=2)

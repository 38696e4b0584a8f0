"""The flow's training step and a sampling of 30 steps against MONAI's U-Net, eager and compiled.

    pytest bench/test_flow.py --benchmark-only --benchmark-json FILE, then python -m bench.table FILE

Rows are as in bench/test_blocks.py. On CUDA the network and the latents are the paper's, in bfloat16 by autocast with
float32 parameters, a compiled sampling with CUDA graphs; on the CPU they are of `quickstart`'s size, in float32, the
latents padded already, which MONAI's network does not do. A training step ends with the gradients; the optimizer, the
same for all, is left out. What is not timed runs once, on small latents and two steps.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from bench import flow_baselines
from bench.floors import Floor
from bench.flow_baselines import FlowStep, Sampling
from bench.test_blocks import (
    DEVICE,
    DTYPE,
    ON_CPU,
    Row,
    _fastest_convolutions,
    _room,
    compiled,
    measured,
    own_layout,
    placed,
    skip_what_cannot_run,
)
from decovae.models.flow_unet import FlowUNetConfig

__all__ = ["_fastest_convolutions", "_room"]

SMALL = FlowUNetConfig(
    channels=(16, 32, 64), attention=(False, False, True), residual_blocks=1, head_channels=32, groups=16
)
CONFIG = SMALL if ON_CPU else FlowUNetConfig()
CHANNELS = 4
LATENT = (16, 20, 16) if ON_CPU else (32, 64, 32)
UNTIMED_LATENT = (8, 8, 8)
TRAINING_BATCH = 4
STEPS, UNTIMED_STEPS = 30, 2

# On the CPU this project's network has no fused operators: "plain" is "ours".
EAGER = ["ours", "monai-eager"] if ON_CPU else ["ours", "plain-eager", "monai-eager"]
COMPILED = ["ours-compiled", "monai-compiled"] if ON_CPU else ["ours-compiled", "plain-compiled", "monai-compiled"]


def row(block: str, name: str, batch: int, direction: str, timed: bool) -> Row:
    latent = LATENT if timed else UNTIMED_LATENT
    shape = (batch, CHANNELS, *latent)
    features = batch * CONFIG.channels[0] * math.prod(latent)
    return Row(block, name, shape, getattr(torch, DTYPE), direction, features, own_layout(name))


def network(wanted: Row) -> nn.Module:
    return placed(wanted, flow_baselines.network(wanted.name.partition("-")[0], CONFIG, CHANNELS))


def floor(wanted: Row, evaluations: int = 1) -> Floor:
    once = flow_baselines.floor(CONFIG, wanted.shape, itemsize=wanted.dtype.itemsize, backward=wanted.backward)
    return Floor(evaluations * once.bytes_moved, evaluations * once.flops)


@pytest.mark.benchmark(min_rounds=5, max_time=2)
@pytest.mark.parametrize("name", [*EAGER, *COMPILED])
def test_training_step(benchmark: Any, name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    wanted = row("training step of the flow", name, TRAINING_BATCH, "forward+backward", benchmark.enabled)
    step: nn.Module = FlowStep(network(wanted))
    if name.endswith("compiled"):
        step = compiled(step, fullgraph=not name.startswith("monai"))
    measured(benchmark, wanted, step, torch.randn(wanted.shape, device=DEVICE), floor(wanted))


@pytest.mark.benchmark(min_rounds=5, max_time=2)
@pytest.mark.parametrize("name", [*EAGER, *COMPILED])
def test_sampling(benchmark: Any, name: str) -> None:
    skip_what_cannot_run(name, timed=benchmark.enabled)
    steps = STEPS if benchmark.enabled else UNTIMED_STEPS
    wanted = row(f"sampling, {steps} steps", name, 1, "forward", benchmark.enabled)
    model = network(wanted)
    if name.endswith("compiled"):
        torch._dynamo.reset()
        mode = None if ON_CPU else "reduce-overhead"
        model = torch.compile(model, mode=mode, dynamic=False)  # type: ignore[assignment]
    noise = torch.randn(wanted.shape, device=DEVICE)
    measured(benchmark, wanted, Sampling(model, steps), noise, floor(wanted, steps))

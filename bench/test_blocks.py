"""The convolutional blocks and the autoencoder against plain torch, eager and compiled, MONAI's MAISI and Liger-Kernel.

    pytest bench/test_blocks.py

A case is one block at one shape, dtype and direction; its rows are the ones to compare. Forward is without gradients,
as in inference. Forward+backward gives the gradients of all parameters and, but for the training step, of what goes in,
from a given gradient of what comes out. A time is one call from Python until the device is done.

At scale gpu shapes are those of the paper's training (two 96³ patches) and of one whole latent, norm + act in both
dtypes, the rest in bfloat16 by autocast with float32 parameters; at the others they are small, and all but norm + act
is float32. Norm + act takes both layouts, its parameters in the dtype of its input. Otherwise the layout is each
implementation's own: contiguous for MONAI, whose norm takes no other; for the rest, unless the name says which,
channels-last on CUDA and contiguous on the CPU, as is faster there. "ours-auto" is what the cost model picks of the two
ways to upsample. MONAI's "float16" is its option norm_float16, which NVIDIA's configurations of MAISI set: it runs
under float16 autocast only, fails in bfloat16, and is compared with what the others do in that. MONAI under
torch.compile is measured at scale gpu only: on a CPU its norms, loops over groups, do not finish compiling in minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bench import block_baselines
from bench.block_baselines import Budgeted, Checkpointed
from bench.fixtures import as_in_training, clean_slate
from bench.floors import Floor
from bench.row import Row, Work, compiled, measured, module_work, own_layout
from bench.scale import DEVICE, DTYPE, SCALE, at_scale
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.blocks import ResidualBlock, Upsample

__all__ = ["as_in_training", "clean_slate"]

Shape = tuple[int, ...]

CONFIG = at_scale(
    gpu=AutoencoderConfig(),
    cpu=AutoencoderConfig(channels=(16, 32, 64), groups=16),
    tiny=AutoencoderConfig(channels=(4, 8, 16), residual_blocks=1, groups=4),
)
FINEST = at_scale(gpu=96, cpu=32, tiny=8)
IMAGE: Shape = (2, 1, FINEST, FINEST, FINEST)
LATENT: Shape = at_scale(gpu=(1, 4, 32, 64, 32), cpu=(1, 4, 8, 16, 8), tiny=(1, 4, 4, 8, 4))
LEVELS: dict[str, Shape] = {
    f"level{level}": (2, width, *[FINEST >> level] * 3) for level, width in enumerate(CONFIG.channels)
}
NORMS: dict[str, tuple[str, ...]] = {
    "level0": ("forward", "forward+backward"),
    "level2": ("forward+backward",),
}
"""Levels whose norms are measured, and how: the finest, bound by memory, and the coarsest, nearly all launches."""


PROOF = ("level0", "float32", "contiguous", "forward+backward")
"""The one compiled row at scale tiny, which shows that such rows run."""


def worth_it(*names: str) -> list[str]:
    """Implementations that finish at this scale."""
    slow = {"gpu": (), "cpu": ("monai",), "tiny": ("",)}[SCALE]
    return [name for name in names if not (name.endswith("compiled") and name.startswith(slow))]


FLOAT16 = at_scale(gpu=["monai-float16-eager"], cpu=[], tiny=[])
"""MONAI's autoencoder with its option norm_float16, which runs under float16 autocast only."""


def norm_rows() -> Iterator[tuple[str, str, str, str, str]]:
    for level, directions in NORMS.items():
        for dtype in ("float32", "bfloat16"):
            for layout in ("contiguous", "channels-last"):
                for direction in directions:
                    names = worth_it("ours", "plain-eager", "plain-compiled", "monai-eager", "liger")
                    if SCALE == "tiny" and (level, dtype, layout, direction) == PROOF:
                        names.append("plain-compiled")
                    for name in names:
                        if name != "monai-eager" or layout == "contiguous":  # MONAI's norm takes no other
                            yield level, dtype, layout, direction, name


@pytest.mark.parametrize(("level", "dtype", "layout", "direction", "name"), list(norm_rows()))
def test_norm_act(benchmark: Any, level: str, dtype: str, layout: str, direction: str, name: str) -> None:
    size = LEVELS[level]
    last = layout == "channels-last"
    row = Row("norm + act", "norm + act", name, size, getattr(torch, dtype), direction, math.prod(size), last, layout)

    def build() -> Work:
        module = block_baselines.norm_act(name.partition("-")[0], size[1], CONFIG.groups).to(DEVICE, row.dtype)
        return features_work(row, compiled(module) if row.compiled else module)

    measured(benchmark, row, row.counting.norm_act(size), build)


RESIDUAL_BLOCKS = worth_it(
    "ours-balanced",
    "ours-tight",
    "plain-contiguous-eager",
    "plain-channels-last-eager",
    "plain-channels-last-compiled",
    "monai-eager",
    "monai-checkpointed",
)


@pytest.mark.parametrize("name", RESIDUAL_BLOCKS)
@pytest.mark.parametrize("level", LEVELS)
def test_residual_block(benchmark: Any, level: str, name: str) -> None:
    size = LEVELS[level]
    row = training_row("residual block", name, size, math.prod(size))
    kind, _, mode = name.partition("-")

    def build() -> Work:
        module = block_baselines.residual_block(mode if kind == "ours" else kind, size[1], CONFIG.groups)
        module = row.placed(Checkpointed(module) if mode == "checkpointed" else module)
        return features_work(row, compiled(module) if row.compiled else module)

    with torch.device("meta"):
        floor, _ = row.counting.residual_block(
            ResidualBlock(size[1], size[1], groups=CONFIG.groups, eps=CONFIG.eps), size
        )
    measured(benchmark, row, floor, build)


UPSAMPLINGS = worth_it("ours-auto", "ours-factorised", "ours-direct", "plain-eager", "plain-compiled", "monai-eager")


@pytest.mark.parametrize("name", UPSAMPLINGS)
@pytest.mark.parametrize("level", list(LEVELS)[1:])
def test_upsampling_convolution(benchmark: Any, level: str, name: str) -> None:
    size = LEVELS[level]
    row = training_row("upsampling + convolution", name, size, 8 * math.prod(size))
    kind, _, mode = name.partition("-")

    def build() -> Work:
        module = row.placed(block_baselines.upsampling(mode if kind == "ours" else kind, size[1]))
        return features_work(row, compiled(module) if row.compiled else module)

    with torch.device("meta"):
        floor, _ = row.counting.row([Upsample(size[1])], size)
    measured(benchmark, row, floor, build)


def training_row(subject: str, name: str, size: Shape, features: int, suite: str = "blocks") -> Row:
    return Row(suite, subject, name, size, DTYPE, "forward+backward", features, own_layout(name))


def features_work(row: Row, module: nn.Module) -> Work:
    """A module on random features in the row's dtype and layout."""
    x = row.place(torch.randn(row.shape, dtype=row.dtype, device=DEVICE)).requires_grad_(row.backward)
    return module_work(row, module, x)


TRAINING_STEPS = worth_it(
    "ours-balanced",
    "ours-tight",
    "plain-eager",
    "plain-compiled",
    "plain-budgeted-compiled",
    "monai-eager",
    *FLOAT16,
    "monai-checkpointed",
    "monai-checkpointed-compiled",
)


@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_training_step(benchmark: Any, name: str) -> None:
    features = CONFIG.channels[0] * math.prod(IMAGE)
    row = training_row("training step of the autoencoder", name, IMAGE, features, "autoencoder")

    def build() -> Work:
        module = row.placed(block_baselines.training_step(name, CONFIG))
        if row.compiled:
            # Checkpointing may break the graph, as it does for whoever trains so.
            module = compiled(module, fullgraph=not name.startswith("monai"))
        if "budgeted" in name:
            module = Budgeted(module)
        return module_work(row, module, torch.rand(IMAGE, device=DEVICE))

    measured(benchmark, row, autoencoder_floor(row), build, seconds=2)


def autoencoder_floor(row: Row) -> Floor:
    with torch.device("meta"):
        return row.counting.autoencoder(Autoencoder(CONFIG, memory=None), row.shape)


@pytest.mark.parametrize("name", worth_it("ours", "plain-compiled", "monai-eager", *FLOAT16))
def test_decoding(benchmark: Any, name: str) -> None:
    features = CONFIG.channels[0] * math.prod(LATENT[2:]) * CONFIG.compression**3
    row = Row("autoencoder", "decoding", name, LATENT, DTYPE, "forward", features, own_layout(name))

    def build() -> Work:
        module = row.placed(block_baselines.decoding(name, CONFIG))
        return module_work(row, compiled(module) if row.compiled else module, torch.randn(LATENT, device=DEVICE))

    with torch.device("meta"):
        floor = row.counting.decoder(Autoencoder(CONFIG, memory=None), LATENT)
    measured(benchmark, row, floor, build, seconds=1)

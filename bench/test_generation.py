"""From noise to a new volume: 30 Euler steps and decoding, at batch 1.

    pytest bench/test_generation.py

"ours" is the sampler of ``decovae sample``, compiled as that compiles it: the flow, with CUDA graphs. "monai" is the
same two networks in MONAI's classes, eager, or both compiled, the flow with CUDA graphs; or eager with channels-last
weights in the U-Net, or with norm_float16 in the autoencoder and float16 autocast. Both begin with noise on the device
and end with a float32 image on the CPU. At scale gpu the networks and the latent are the paper's and the precision is
bfloat16, in which this project's decoder keeps its last norm and convolution in float32; elsewhere all is small and
float32. On the CPU this project computes a sample on one thread, so that its bits do not depend on what is made beside
it, and MONAI on all; there nothing is compiled.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import flow_baselines
from bench.fixtures import as_in_training, clean_slate
from bench.floors import Counting, Floor
from bench.generation_baselines import Chain, volume
from bench.row import Row, Work, bytes_of, measured, own_layout
from bench.scale import DEVICE, DTYPE, PRECISION, at_scale
from bench.test_blocks import CONFIG as AUTOENCODER
from bench.test_flow import CHANNELS, STEPS
from bench.test_flow import CONFIG as FLOW
from decovae.models.autoencoder import Autoencoder

__all__ = ["as_in_training", "clean_slate"]

LATENT = at_scale(gpu=(CHANNELS, 32, 64, 32), cpu=(CHANNELS, 8, 16, 8), tiny=(CHANNELS, 4, 8, 4))
IMPLEMENTATIONS = at_scale(
    gpu=[
        "ours",
        "ours-compiled",
        "monai-eager",
        "monai-float16-eager",
        "monai-channels-last-eager",
        "monai-compiled",
    ],
    cpu=["ours", "monai-eager"],
    tiny=["ours", "monai-eager", "monai-channels-last-eager"],
)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_volume(benchmark: Any, name: str) -> None:
    shape = (1, *LATENT)
    chain = Chain(FLOW, AUTOENCODER, LATENT, STEPS, PRECISION, DEVICE)
    features = AUTOENCODER.channels[0] * chain.voxels
    subject = f"a volume: {STEPS} steps and decoding"
    row = Row("generation", subject, name, shape, DTYPE, "forward", features, own_layout(name))

    def build() -> Work:
        make = volume(name, chain)
        noise = torch.randn(shape, device=DEVICE)

        def run() -> object:
            return make(noise)

        held = bytes_of(noise, *make.parameters(), *make.buffers())
        # The result is on the CPU: nothing of it is left on a GPU.
        result = chain.voxels * torch.float32.itemsize if DEVICE.type == "cpu" else 0
        return Work(run, result, held, count=None if row.compiled else run, graphs=row.compiled)

    measured(benchmark, row, floor(shape), build, seconds=2)


def floor(shape: tuple[int, ...]) -> Floor:
    """That of the flow as often as it is evaluated, and of the decoder."""
    once = flow_baselines.floor(FLOW, shape, itemsize=DTYPE.itemsize, backward=False)
    with torch.device("meta"):
        decoding = Counting(DTYPE.itemsize, backward=False).decoder(Autoencoder(AUTOENCODER, memory=None), shape)
    return Floor(STEPS * once.bytes_moved, STEPS * once.flops) + decoding

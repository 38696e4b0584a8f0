"""What is applied to a network from outside changes how it is computed, not what."""

from __future__ import annotations

import shutil

import pytest
import torch

from decovae import vad_loss
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.fuse import Memory
from decovae.runtime import Runtime
from decovae.training.parallel import prepare_module

CONFIG = AutoencoderConfig(channels=(4, 8), residual_blocks=1, groups=2)
NO_COMPILER = not any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def outputs_and_gradients(model: Autoencoder) -> list[torch.Tensor]:
    torch.manual_seed(1)
    image = torch.rand(2, 1, 8, 12, 8)
    reconstruction, (z, kl, moments) = model(image)
    ((reconstruction - image).abs().mean() + kl + vad_loss(moments)).backward()
    return [reconstruction, z, kl, moments.packed, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("memory", "compiled"),
    [
        (None, False),
        ("balanced", False),
        ("tight", False),
        pytest.param(
            "balanced",
            True,
            marks=pytest.mark.skipif(NO_COMPILER, reason="torch.compile needs a C++ compiler on the CPU"),
        ),
    ],
)
def test_layout_memory_and_compilation_keep_outputs_and_gradients(memory: Memory | None, compiled: bool) -> None:
    torch.manual_seed(0)
    plain, prepared = Autoencoder(CONFIG, memory=None), Autoencoder(CONFIG, memory=memory)
    prepared.load_state_dict(plain.state_dict())
    keys = list(plain.state_dict())
    prepare_module(prepared, Runtime(torch.device("cpu")), compiled=compiled)
    assert list(prepared.state_dict()) == keys
    for mine, expected in zip(outputs_and_gradients(prepared), outputs_and_gradients(plain), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)

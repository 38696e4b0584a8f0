"""What is applied to a network from outside changes how it is computed, not what."""

from __future__ import annotations

import shutil

import pytest
import torch

from decovae import vad_loss
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
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


@pytest.mark.parametrize("world", [1, 2])
def test_a_compiled_flow_stays_compiled_in_training(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever sizes validation and previews have had before, each with its own kernels."""
    ran: list[list[object]] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[object]):
        def run(*arguments: object):
            ran[-1].extend(argument for argument in arguments if isinstance(argument, int))
            counts[-1] += 1
            return graph(*arguments)

        return run

    counts: list[int] = []
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend=counting, **options)
    )
    monkeypatch.setattr("decovae.training.parallel.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("decovae.training.parallel.fully_shard", lambda *_, **__: None)
    config = FlowUNetConfig(channels=(4, 4, 8, 8), attention=(False,) * 4, residual_blocks=1, head_channels=4, groups=2)
    network = FlowUNet(config)
    prepare_module(network, Runtime(torch.device("cpu"), world=world), compiled=True)
    sizes = (8, 2, 4, 1, 4)
    for size in sizes:  # validation, preview, training, another, training again
        counts.append(0)
        ran.append([])
        with torch.set_grad_enabled(size == 4):
            network(torch.randn(size, 4, 8, 8, 8), torch.rand(size))
    expected = 1 if world == 1 else len(network.levels)
    assert counts == [expected] * len(sizes)
    assert ran == [[]] * len(sizes)  # no size is an argument: all are constants

"""What is applied to a network from outside changes how it is computed, not what."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from decovae import vad_loss
from decovae.losses.objective import LossConfig, VAEObjective
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.discriminators import Discriminators
from decovae.models.flow_unet import FlowUNet, FlowUNetConfig
from decovae.models.fuse import Memory
from decovae.models.fused import Carry
from decovae.runtime import Runtime
from decovae.training import parallel
from decovae.training.config import ParallelConfig, RunConfig, Strategy, VAEConfig
from decovae.training.parallel import accumulating, prepare_module
from decovae.training.vae import VAENetworks
from tests.ranks import free_port, joined, spawn

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
    prepare_module(prepared, Runtime(torch.device("cpu")), RunConfig(compile="on" if compiled else "off"))
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
    monkeypatch.setattr("decovae.training.parallel.mesh_of", lambda *_: None)
    monkeypatch.setattr("decovae.training.parallel._shard", lambda *_, **__: None)
    config = FlowUNetConfig(channels=(4, 4, 8, 8), attention=(False,) * 4, residual_blocks=1, head_channels=4, groups=2)
    network = FlowUNet(config)
    prepare_module(network, Runtime(torch.device("cpu"), world=world), RunConfig(compile="on"))
    sizes = (8, 2, 4, 1, 4)
    for size in sizes:  # validation, preview, training, another, training again
        counts.append(0)
        ran.append([])
        with torch.set_grad_enabled(size == 4):
            network(torch.randn(size, 4, 8, 8, 8), torch.rand(size))
    expected = 1 if world == 1 else len(network.levels)
    assert counts == [expected] * len(sizes)
    assert ran == [[]] * len(sizes)  # no size is an argument: all are constants


def test_statistics_are_known_of_another_view_of_the_same_features() -> None:
    """FSDP puts one between blocks; what was written to since is no longer the same."""
    features, statistics, carry = torch.rand(2, 3), torch.rand(1), Carry()
    carry.put(features, statistics)
    assert carry.of(features.view_as(features)) is not None
    assert carry.of(features[:, :2]) is None
    assert carry.of(features.clone()) is None
    features.add_(1)
    assert carry.of(features.view_as(features)) is None


class Messages(TorchDispatchMode):
    """Counts what processes send each other."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sent[func._opname.strip("_")] += 1
        return func(*args, **kwargs or {})


def gan(runtime: Runtime, strategy: Strategy, precision: str = "fp32") -> VAENetworks:
    config = VAEConfig(
        model=CONFIG,
        loss=LossConfig(perceptual=0.0, slice_fraction=0.05, adversarial_warmup=0),
        deco="none",
        compile="off",
        parallel=ParallelConfig(strategy=strategy),
    )
    config = replace(config, precision=precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decovae.models.discriminators.Discriminators", partial(Discriminators, channels=4, layers=2))
        return VAENetworks(config, runtime, VAEObjective(config.loss, deco="none"))


def untouched(network: torch.nn.Module) -> bool:
    """Whether it is sharded, and holds no gradient."""
    return all(isinstance(weight, DTensor) and weight.grad is None for weight in network.parameters())


def check_passes(rank: int, port: int) -> None:
    parallel.UNIT = 1
    with joined(rank, port) as runtime, torch.backends.mkldnn.flags(enabled=False):
        batch = {"image": torch.rand(1, 1, 16, 16, 16), "position": torch.tensor([rank])}
        strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
        for strategy in strategies:
            networks = gan(runtime, strategy)
            check_batches(networks, batch, strategy)
        networks = gan(runtime, "fsdp", "bf16")
        with accumulating(networks.networks.values(), last=True):
            losses = networks.losses(batch, 0)
            for _ in networks.networks:
                with torch.autocast("cpu", torch.bfloat16):
                    _, loss = next(losses)
                loss.total.backward()
        for network in networks.networks.values():
            for weight in network.parameters():
                assert weight.dtype == torch.float32
                assert weight.grad is not None
                assert weight.grad.dtype == torch.float32
                assert weight.grad.full_tensor().isfinite().all()


def check_batches(networks: VAENetworks, batch: Any, strategy: Strategy) -> None:
    """Two batches of one step: the first sends no gradient, and neither leaves anything in the other network."""
    generator, discriminators = networks.networks.values()
    units = {
        name: sum(isinstance(module, parallel.FSDPModule) for module in network.modules())
        for name, network in networks.networks.items()
    }
    assert units["autoencoder"] > 3
    reduction = "allreduce" if strategy == "ddp" else "reduce_scatter_base"
    for last in (False, True):
        with accumulating(networks.networks.values(), last=last):
            losses = networks.losses(batch, 0)
            for name, other in (("autoencoder", discriminators), ("discriminators", generator)):
                with Messages() as messages:
                    found, loss = next(losses)
                    assert found == name
                    loss.total.backward()
                sent = messages.sent[reduction] + messages.sent[f"_{reduction}"]
                assert sent == (units[name] if last else 0), (strategy, name, messages.sent)
                if strategy == "ddp":
                    assert messages.sent.total() == sent
                if last and name == "autoencoder":
                    assert untouched(other)
            next(losses, None)
    for network in networks.networks.values():
        assert all(isinstance(weight, DTensor) and weight.grad is not None for weight in network.parameters())
        assert all(weight.requires_grad for weight in network.parameters())


def test_a_pass_sends_what_it_has_to_and_leaves_the_other_network_alone() -> None:
    spawn(check_passes, (free_port(),), 2)

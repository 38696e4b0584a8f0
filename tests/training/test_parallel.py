"""What is applied to a network from outside changes how it is computed, not what."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
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
from decovae.training.config import AdversarialOptimizerConfig, ParallelConfig, RunConfig, Strategy, VAEConfig
from decovae.training.parallel import accumulating, prepare_module
from decovae.training.sharding import Sharding
from decovae.training.step import Step
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


GAN = VAEConfig(
    model=CONFIG,
    loss=LossConfig(perceptual=0.0, slice_fraction=0.05, adversarial_warmup=0),
    deco="none",
    precision="fp32",
    compile="off",
)


def gan(runtime: Runtime, strategy: Strategy, **options: Any) -> VAENetworks:
    config = replace(GAN, parallel=ParallelConfig(strategy=strategy), **options)
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
        networks = gan(runtime, "fsdp", precision="bf16")
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


class Compiler:
    """Torch's, up to the graphs, which then run as they are; it counts those that it makes and those that run."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def run(*arguments: Any) -> Any:
            self.ran += 1
            return graph(*arguments)

        return run


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(networks: VAENetworks, runtime: Runtime, step: int) -> dict[str, Tensor]:
    """Losses and gradients of one step of two batches, and a validation of another size after it."""
    updates = Step(networks, networks.config, runtime)
    positions = [(2 * step + batch) * runtime.world + runtime.rank for batch in (0, 1)]
    found = updates.gradients(iter([{"image": image(at), "position": torch.tensor([at])} for at in positions]), step)
    gradients = {
        f"{name}.{key}": whole(weight.grad)
        for name, network in networks.networks.items()
        for key, weight in network.named_parameters()
    }
    updates.update(step)
    with torch.no_grad():
        validation = networks.autoencoder(image(0, 24, 16, 20), sample=False)[0]
    return {**found.terms, **gradients, "validation": validation}


def image(at: int, *shape: int) -> Tensor:
    return torch.rand(1, 1, *(shape or (16, 16, 16)), generator=torch.Generator().manual_seed(at))


def check_compiled(runtime: Runtime, strategy: Strategy) -> None:
    """Every block is one graph, whose hooks gather and scatter around it; what is made is made in the first step."""
    torch._dynamo.reset()
    compiler, compile_module = Compiler(), nn.Module.compile
    # Fused blocks would not be compiled.
    options = {"memory": "none", "deco": "vad", "optimizer": AdversarialOptimizerConfig(accumulation=2)}
    plain = gan(runtime, strategy, **options)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, **given: compile_module(self, backend=compiler, **given))
        compiled = gan(runtime, strategy, compile="on", **options)
        blocks = sum(len(cascade.blocks) for cascade in parallel._cascades(compiled.autoencoder))
        judged = 2 * (1 + 3)  # by both networks' losses: a volume, and slices of three planes
        made = []
        for step in range(3):
            compiler.ran = 0
            found = trained(compiled, runtime, step)
            made.append(compiler.made)
            assert compiler.ran == 2 * (blocks + judged) + blocks  # two batches and a validation
            expected = trained(plain, runtime, step)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{name} of step {step}")
    assert made == [made[0]] * len(made)
    for network in compiled.networks.values():
        assert untouched(network)


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """A process that is sharded alone, which a run of one process is not."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(parallel, "UNIT", 1_000)  # some units of one block, some of several
    monkeypatch.setattr(parallel, "choose_sharding", lambda *_: Sharding("fsdp", 1, 1, 1, "alone"))
    yield Runtime(torch.device("cpu"), group=dist.group.WORLD)
    dist.destroy_process_group()


def test_sharded_blocks_stay_compiled_as_they_are(group_of_one: Runtime) -> None:
    check_compiled(group_of_one, "fsdp")


def check_compiled_on_ranks(rank: int, port: int) -> None:
    parallel.UNIT = 1
    with joined(rank, port) as runtime:
        strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
        for strategy in strategies:
            check_compiled(runtime, strategy)


@pytest.mark.slow
def test_blocks_of_several_processes_stay_compiled_as_they_are() -> None:
    spawn(check_compiled_on_ranks, (free_port(),), 2)

"""Compilation and sharding, applied to finished models from outside: a model file knows of neither."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from decovae.losses.latent_head import LatentHead
from decovae.models.blocks import Cascade, Downsample, Named, ResidualBlock, Upsample
from decovae.models.flow_unet import FlowUNet
from decovae.models.fused import Fused
from decovae.runtime import Runtime
from decovae.training.config import RunConfig
from decovae.training.sharding import choose_sharding, mesh_of

COMPILED_VARIANTS = 128
"""Variants of blocks to keep compiled at once."""

UNIT = 1_000_000
"""Parameters that travel together at least, of blocks in a row: a message of fewer costs more in its start than in its
bytes, and one of many more cannot go out before most of the backward is done."""


def prepare_module(module: nn.Module, runtime: Runtime, config: RunConfig) -> None:
    """Move a network to its device and layout, compile its blocks, and shard it where there are several processes.

    Convolutions are fastest channels-last, but for the flow's on the CPU; sharding takes contiguous weights only.

    Raises:
        InputError: if the strategy does not fit the processes.
    """
    sharding = choose_sharding(config, runtime)
    if sharding is None and not (isinstance(module, FlowUNet) and runtime.device.type == "cpu"):
        for parameter in module.parameters():
            if parameter.ndim in (4, 5):
                layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)
    runtime.place(module)
    if compiles(config, runtime):
        _compile(module, whole=sharding is None)
    if sharding is not None:
        _shard(module, mesh_of(sharding, runtime), bf16=uses_bf16(config, runtime))


def compiles(config: RunConfig, runtime: Runtime) -> bool:
    """Whether networks are compiled: where asked for, else on CUDA."""
    return config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")


def uses_bf16(config: RunConfig, runtime: Runtime) -> bool:
    """Whether networks compute in bfloat16: where asked for, else on CUDA."""
    return config.precision == "bf16" or (config.precision == "auto" and runtime.device.type == "cuda")


def _compile(module: nn.Module, *, whole: bool) -> None:
    # All blocks share the cache of one code object, with an entry for each kind, size, and mode of gradients; past
    # the limit they would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    if isinstance(module, FlowUNet):
        # As a whole; sharded parts one by one, between which weights are gathered. Each of its few batch sizes, of
        # training, validation and previews, has kernels of its own: shared ones would be slower in every step.
        for part in [module] if whole else module.levels:
            part.compile(dynamic=False)
        return
    # Fused blocks are operators already: there is nothing in them to compile.
    blocks = [block for cascade in _cascades(module) for block in cascade.blocks if not isinstance(block, Fused)]
    # The latent head is one operator already, and compiled it would draw its seed from another stream.
    others = [child for child in module.children() if not isinstance(child, Cascade | Named | LatentHead)]
    for block in blocks + others:
        block.compile()


def _cascades(module: nn.Module) -> list[Cascade]:
    return [child for child in module.children() if isinstance(child, Cascade)]


def _shard(module: nn.Module, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Let FSDP keep the weights: sharded between steps, gathered unit by unit while forward and backward pass."""
    policy = MixedPrecisionPolicy()
    if bf16:
        # Autocast casts what goes through a network, and leaves what is to stay float32.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # FSDP warns of what writes into such an output; no block does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    units = _units(module)
    for unit in units:
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, mp_policy=policy)
    # By default a root keeps its weights gathered after a forward without backward, a validation's: whoever then
    # reads or writes the weights would find them in two forms.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # By default at the first forward, from the weights that are trained then; discriminators are frozen in theirs.
    module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    # What is used next is on its way while this computes; of backward, that is what was used before.
    order = [module, *(unit[0] for unit in units)]
    for before, after in pairwise(order):
        assert isinstance(before, FSDPModule)
        assert isinstance(after, FSDPModule)
        before.set_modules_to_forward_prefetch([after])
        if before is not module:  # whose weights stay until its backward ends
            after.set_modules_to_backward_prefetch([before])


def _units(module: nn.Module) -> list[list[nn.Module]]:
    """Modules whose weights travel together, in order of use; what is in none travels with the whole network's root.

    Norms and convolutions in a row stay with the root: a fused convolution reads the weights of the norm before it,
    which is never called itself. Discriminators are one unit: real and generated images pass at once.
    """
    if isinstance(module, FlowUNet):
        return [[level] for level in module.levels]
    units: list[list[nn.Module]] = []
    for cascade in _cascades(module):
        size = UNIT
        for block in cascade.blocks:
            if isinstance(block, ResidualBlock | Downsample | Upsample):
                if size >= UNIT:
                    units.append([])
                    size = 0
                units[-1].append(block)
                size += sum(parameter.numel() for parameter in block.parameters())
    return units


_WAITING: WeakSet[nn.Module] = WeakSet()
"""Networks whose gradients stay in this process until the last batch of the step."""


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Parameters that take no gradient, while gradients still pass through to the input.

    What a network accumulated before stays where it is, and is sent by its own backward.
    """
    if module is None:
        yield
        return
    _freeze(module, True)
    try:
        yield
    finally:
        _freeze(module, False)


def _freeze(module: nn.Module, yes: bool) -> None:
    # Sharded and gathered, a weight is two parameters, and gathering copies the setting of the one to the other.
    _let_go(module)
    module.requires_grad_(not yes)
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not yes and module not in _WAITING)


@contextmanager
def accumulating(networks: Iterable[nn.Module], *, last: bool) -> Iterator[None]:
    """The passes over one of the batches of a step: only those over the last send gradients to other processes.

    Until then a network keeps its weights gathered, too, which costs the memory of one whole copy. After the last,
    every network is sharded again, whatever was or was not computed with it.
    """
    every = list(networks)
    for network in every:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(last)
            network.set_reshard_after_forward(last)
            network.set_reshard_after_backward(last)
            network.set_is_last_backward(last)
        (_WAITING.discard if last else _WAITING.add)(network)
    try:
        yield
    finally:
        if last:
            for network in every:
                _let_go(network)


def _let_go(network: nn.Module) -> None:
    """Give back the gathered weights of a network, if any are."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

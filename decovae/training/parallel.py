"""Compilation and sharding, applied to finished models from outside: a model file knows of neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from decovae.losses.latent_head import LatentHead
from decovae.models.blocks import Cascade, Named
from decovae.models.flow_unet import FlowUNet
from decovae.models.fused import Fused
from decovae.runtime import Runtime
from decovae.training.config import RunConfig

COMPILED_VARIANTS = 128
"""Variants of blocks to keep compiled at once."""


def prepare_module(module: nn.Module, runtime: Runtime, *, compiled: bool) -> None:
    """Move a network to its device and layout, compile its blocks, and shard it where there are several processes.

    Convolutions are fastest channels-last, but for the flow's on the CPU; sharding takes contiguous weights only.
    """
    levels = module.levels if isinstance(module, FlowUNet) else []
    if runtime.world == 1 and not (levels and runtime.device.type == "cpu"):
        for parameter in module.parameters():
            if parameter.ndim in (4, 5):
                layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)
    runtime.place(module)
    cascades = [child for child in module.children() if isinstance(child, Cascade)]
    if compiled:
        # All blocks share the cache of one code object, with an entry for each kind, size, and mode of gradients; past
        # the limit they would silently run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    if compiled and levels:
        # As a whole; sharded parts one by one, between which weights are gathered. Each of its few batch sizes, of
        # training, validation and previews, has kernels of its own: shared ones would be slower in every step.
        for part in [module] if runtime.world == 1 else levels:
            part.compile(dynamic=False)
    elif compiled:
        # Fused blocks are operators already: there is nothing in them to compile.
        blocks = [block for cascade in cascades for block in cascade.blocks if not isinstance(block, Fused)]
        # The latent head is one operator already, and compiled it would draw its seed from another stream.
        others = [child for child in module.children() if not isinstance(child, Cascade | Named | LatentHead)]
        for block in blocks + others:
            block.compile()
    if runtime.world > 1:
        mesh = init_device_mesh(runtime.device.type, (runtime.world,))
        for part in levels or cascades:
            fully_shard(part, mesh=mesh)
        # By default a root keeps its weights gathered after a forward without backward, a validation's: whoever then
        # reads or writes the weights would find them in two forms.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def compiles(config: RunConfig, runtime: Runtime) -> bool:
    """Whether networks are compiled: where asked for, else on CUDA."""
    return config.compile == "on" or (config.compile == "auto" and runtime.device.type == "cuda")


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Parameters that take no gradient, while gradients still pass through to the input."""
    if module is None:
        yield
        return
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def synchronize_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward averages gradients over processes; False while a step still accumulates."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)

"""The tensors of a checkpoint by name: where they come from in a run, and how an optimiser takes them back.

Names are ``autoencoder.weights.<name>``, ``autoencoder.average.<name>`` and ``autoencoder.optimizer.exp_avg.<name>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from decovae.training.ema import ExponentialMovingAverage

COUNT = "step"
"""What an optimiser keeps of a parameter that has not its shape: how many steps it has made."""


def weights_of(modules: Mapping[str, nn.Module], averages: Mapping[str, ExponentialMovingAverage]) -> dict[str, Tensor]:
    """Weights, buffers and averages, in the memory that the run has them in.

    Sharded networks that hold gathered weights let go of them.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}.weights.{key}": weight.detach() for key, weight in module.state_dict().items()}
        if name in averages:
            tensors |= {f"{name}.average.{key}": average for key, average in averages[name].averages.items()}
    return tensors


def moments_of(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """What the optimisers keep of each parameter: nothing where one has made no step yet.

    Of sharded networks these are found once `weights_of` was called.
    """
    return {
        f"{name}.optimizer.{slot}.{key}": value
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        for slot, value in optimizers[name].state.get(parameter, {}).items()
    }


def another_model(metadata: Metadata, weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> str | None:
    """The first tensor that a checkpoint and this run do not have alike, in words; None where they fit."""
    there = {name: tuple(item.size) for name, item in _described(metadata).items()}
    here = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, slot, parameter in _moments(metadata, modules):
        here[name] = () if slot == COUNT else tuple(parameter.shape)
    different = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if not different:
        return None
    first = different[0]
    return f"{first} is {_words(there.get(first))} there and {_words(here.get(first))} here"


def new_moments(metadata: Metadata, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Zeros for what the optimisers kept when a checkpoint was written, laid out as the parameters are here."""
    described = _described(metadata)
    moments: dict[str, Tensor] = {}
    for name, slot, parameter in _moments(metadata, modules):
        dtype = described[name].properties.dtype
        moments[name] = torch.zeros((), dtype=dtype) if slot == COUNT else torch.zeros_like(parameter, dtype=dtype)
    return moments


def take_moments(
    moments: Mapping[str, Tensor], modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> None:
    """Hand the optimisers what was read, in place of what they kept."""
    for network, module in modules.items():
        optimizer = optimizers[network]
        optimizer.state.clear()
        # Where a step is one kernel it counts on the device, and elsewhere on the CPU.
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        parameters = dict(module.named_parameters())
        for name, value in moments.items():
            if name.startswith(prefix := f"{network}.optimizer."):
                slot, _, key = name.removeprefix(prefix).partition(".")
                parameter = parameters[key]
                counts = slot == COUNT and on_device
                optimizer.state[parameter][slot] = value.to(parameter.device) if counts else value


def _moments(metadata: Metadata, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Of what optimisers kept in a checkpoint: its name, what it is, and the parameter of this run it belongs to."""
    for network, module in modules.items():
        parameters = dict(module.named_parameters())
        for name in _described(metadata):
            if name.startswith(prefix := f"{network}.optimizer."):
                slot, _, key = name.removeprefix(prefix).partition(".")
                if key in parameters:
                    yield name, slot, parameters[key]


def _described(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    items = metadata.state_dict_metadata.items()
    return {name: item for name, item in items if isinstance(item, TensorStorageMetadata)}


def _words(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "missing"
    return "×".join(map(str, shape)) or "one number"

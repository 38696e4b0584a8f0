"""Which way an upsampling convolution takes: predicted seconds of a training step, the same on every run.

The direct way convolves at high resolution: 8·27·C_in·C_out multiply-adds a low-resolution voxel forward, twice that
backward. The factorised way needs an eighth of them, and moves its 27 products of C_out channels in return. What a kind
of device does in a second stands in `upsample_conv_cost.json`, with where each figure comes from;
`python -m bench.tune` measures a card's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from decovae_kernels.configurations import DEFAULT, architecture, check_provenance

FILE = Path(__file__).with_name("upsample_conv_cost.json")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a kind of device does in a second, and what the two ways ask of it besides matrix products.

    Products, convolutions: multiply-adds count as 2, by the dtype's bytes an element.
    Bandwidth: bytes; per channel and voxel of low resolution, forward and backward together, the direct way reads or
    writes `direct_moves` elements and the factorised way `factorised_moves`. Lanes: instructions of single threads;
    the factorised way's kernels issue `instructions` of them per channel and voxel.
    """

    products: dict[int, float]
    convolutions: dict[int, float]
    bandwidth: float
    direct_moves: float
    factorised_moves: float
    lanes: float
    instructions: float

    def direct(self, in_channels: int, out_channels: int, voxels: int, element: int) -> float:
        """Predicted seconds of forward and backward."""
        # Convolutions work on 8 channels at a time.
        padded = -(-in_channels // 8) * 8, -(-out_channels // 8) * 8
        arithmetic = 3 * direct_flops(*padded, voxels) / self.convolutions[element]
        moved = self.direct_moves * voxels * (in_channels + out_channels) / 2 * element
        return arithmetic + moved / self.bandwidth

    def factorised(self, in_channels: int, out_channels: int, voxels: int, element: int) -> float:
        """Predicted seconds of forward and backward."""
        arithmetic = 3 * factorised_flops(in_channels, out_channels, voxels) / self.products[element]
        moved = self.factorised_moves * voxels * out_channels * element
        return arithmetic + moved / self.bandwidth + self.instructions * voxels * out_channels / self.lanes


def machines() -> Mapping[str, Machine]:
    """The machines of the data file: "cpu", "default", and GPUs by their architecture.

    Raises:
        ValueError: the file is not readable, or a name or value in it makes no sense; says which.
    """
    try:
        data = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{FILE}: not a readable JSON file ({error}): reinstall decovae_kernels") from error
    return parse(data, str(FILE))


def parse(data: Any, source: str) -> Mapping[str, Machine]:
    """The machines that `data`, read from `source`, describes; raises like `machines`."""
    if not isinstance(data, dict) or not {"cpu", DEFAULT} <= set(data):
        raise ValueError(f"{source}: must be an object with at least the machines 'cpu' and 'default'")
    return {name: parse_machine(values, f"{source}: {name}", _SIZES.get(name, _GPU)) for name, values in data.items()}


_GPU = "2", "4"
"""Bytes of the elements that a GPU multiplies."""

_SIZES = {"cpu": ("4", "8")}
"""Those that others do."""


def parse_machine(values: Any, where: str, sizes: tuple[str, ...] = _GPU) -> Machine:
    """The machine that `values` describe; raises like `machines`, in messages that begin with `where`."""
    fields = [field.name for field in dataclasses.fields(Machine)]
    if not isinstance(values, dict) or set(values) != {*fields, "chosen"}:
        raise ValueError(f"{where}: must state {', '.join(fields)}, chosen")
    check_provenance(values["chosen"], where)
    rates = {}
    for name in ("products", "convolutions"):
        if not isinstance(values[name], dict) or set(values[name]) != set(sizes):
            raise ValueError(f"{where}: {name} must give a rate for elements of {' and '.join(sizes)} bytes")
        rates[name] = {int(size): _number(values[name][size], f"{where}, {name}", least=1) for size in sizes}
    return Machine(
        **rates,
        bandwidth=_number(values["bandwidth"], f"{where}, bandwidth", least=1),
        direct_moves=_number(values["direct_moves"], f"{where}, direct_moves"),
        factorised_moves=_number(values["factorised_moves"], f"{where}, factorised_moves"),
        lanes=_number(values["lanes"], f"{where}, lanes", least=1),
        instructions=_number(values["instructions"], f"{where}, instructions"),
    )


def _number(value: Any, where: str, *, least: float = 0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise ValueError(f"{where}: {value!r} must be a finite number, {least} or more")
    return float(value)


def direct_flops(in_channels: int, out_channels: int, voxels: int) -> int:
    """Of the forward pass; multiply-adds count as 2, `voxels` are those of low resolution."""
    return 8 * factorised_flops(in_channels, out_channels, voxels)


def factorised_flops(in_channels: int, out_channels: int, voxels: int) -> int:
    """Of the forward pass; the sums after the products, like every other addition, are not counted."""
    return 2 * 27 * in_channels * out_channels * voxels


def chosen(x: torch.Tensor, out_channels: int, triton: bool) -> str:
    """Which of "direct" and "factorised" for `x` (N, C_in, D, H, W), by shape, dtype and kind of device alone."""
    if x.device.type == "cuda" and not triton:
        # Sums over the products that wait for memory at every step: nothing is gained.
        return "direct"
    machine = _machine(x.device, triton)
    volumes, in_channels, depth, height, width = x.shape
    # In plain torch the factorised way computes half precision in float32.
    element = x.element_size() if triton else max(x.element_size(), 4)
    figures = in_channels, out_channels, volumes * depth * height * width, element
    return "factorised" if machine.factorised(*figures) < machine.direct(*figures) else "direct"


@functools.cache
def _machine(device: torch.device, triton: bool) -> Machine:
    # Tensors without memory that stand for a GPU's stand for a workstation's.
    return _MACHINES.get(architecture(device), _MACHINES[DEFAULT]) if triton else _MACHINES["cpu"]


_MACHINES = machines()

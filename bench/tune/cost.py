"""The upsampling convolution's cost model, fitted to what a card takes, and how often it would choose wrongly.

Each layer is timed forward and backward, both ways; within the direct way its convolutions, within the factorised way
its matrix products. What they leave of the whole is what the model's moves and instructions have to explain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decovae_kernels.upsample_conv import upsample_conv
from decovae_kernels.upsample_conv_cost import Machine, direct_flops, factorised_flops

Clock = Callable[[Callable[[], object]], float]
"""Seconds of one call."""

LAYERS: dict[str, tuple[tuple[int, ...], int]] = {
    # Input (N, C, D, H, W), output channels: the paper's two layers, on patches and on a whole volume, and others.
    "level2": ((2, 256, 24, 24, 24), 256),
    "level1": ((2, 128, 48, 48, 48), 128),
    "whole level2": ((1, 256, 32, 64, 32), 256),
    "whole level1": ((1, 128, 64, 128, 64), 128),
    "wide": ((1, 512, 16, 16, 16), 512),
    "middle": ((2, 64, 48, 48, 48), 64),
    "narrow": ((2, 32, 48, 48, 48), 32),
    "to few": ((2, 64, 48, 48, 48), 16),
    "few": ((2, 8, 48, 48, 48), 8),
}
TINY = {"tiny": ((1, 8, 2, 3, 4), 8), "tiny wide": ((1, 16, 3, 2, 2), 16)}
DTYPES = (torch.bfloat16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One layer: its sizes, and seconds of forward and backward together."""

    layer: str
    in_channels: int
    out_channels: int
    voxels: int
    element: int
    direct: float
    convolutions: float
    factorised: float
    products: float

    @property
    def figures(self) -> tuple[int, int, int, int]:
        return self.in_channels, self.out_channels, self.voxels, self.element


class Choice(NamedTuple):
    """What the model says of a layer and what was measured; `lost` is the share of time that its choice costs."""

    layer: str
    element: int
    predicted: dict[str, float]
    measured: dict[str, float]
    chosen: str
    faster: str
    lost: float


def measure(
    name: str, sizes: Sequence[int], out_channels: int, dtype: torch.dtype, device: torch.device, clock: Clock
) -> Measured:
    """Time one layer on `device`, in the settings of the process; those of training are `bench.settings`'."""
    volumes, in_channels, *spatial = sizes
    voxels = volumes * math.prod(spatial)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def features(channels: int, factor: int) -> Tensor:
        shape = volumes, *(factor * size for size in spatial), channels
        return random(*shape).movedim(-1, 1)

    x, grad = features(in_channels, 1).requires_grad_(), features(out_channels, 2)
    weight = random(out_channels, in_channels, 3, 3, 3, scale=(27 * in_channels) ** -0.5).requires_grad_()

    def whole(method: str) -> float:
        return clock(lambda: torch.autograd.grad(upsample_conv(x, weight, method=method), (x, weight), grad))

    upsampled = features(in_channels, 2)
    laid_out = weight.detach().contiguous(memory_format=torch.channels_last_3d)
    ones, zeros = [1, 1, 1], [0, 0, 0]

    def convolve() -> object:
        torch.nn.functional.conv3d(upsampled, laid_out, padding=1)
        return torch.ops.aten.convolution_backward(
            grad, upsampled, laid_out, None, ones, ones, ones, False, zeros, 1, [True, True, False]
        )

    rows, mixing = random(voxels, in_channels), random(in_channels, 27 * out_channels)
    pulled = random(voxels, 27 * out_channels)

    def multiply() -> object:
        return torch.mm(rows, mixing), torch.mm(pulled, mixing.T), torch.mm(rows.T, pulled)

    return Measured(
        name, in_channels, out_channels, voxels, dtype.itemsize,
        direct=whole("direct"), convolutions=clock(convolve), factorised=whole("factorised"), products=clock(multiply),
    )  # fmt: skip


def fit(found: Sequence[Measured], bandwidth: float, lanes: float) -> dict[str, Any]:
    """Fields of a `Machine` as its data file has them.

    Raises:
        ValueError: there is no layer of 2 or none of 4 bytes an element.
    """
    products, convolutions = {}, {}
    for element in (2, 4):
        some = [one for one in found if one.element == element]
        if not some:
            raise ValueError(f"no layer with elements of {element} bytes was measured")
        operations = sum(3 * factorised_flops(one.in_channels, one.out_channels, one.voxels) for one in some)
        products[str(element)] = operations / sum(one.products for one in some)
        convolved = sum(
            3 * direct_flops(_padded(one.in_channels), _padded(one.out_channels), one.voxels) for one in some
        )
        convolutions[str(element)] = convolved / sum(one.convolutions for one in some)
    moved = [one.voxels * (one.in_channels + one.out_channels) / 2 * one.element / bandwidth for one in found]
    direct_moves = sum(max(one.direct - one.convolutions, 0) for one in found) / sum(moved)
    rows = [
        (one.voxels * one.out_channels * one.element / bandwidth, one.voxels * one.out_channels / lanes)
        for one in found
    ]  # fmt: skip
    rest = [max(one.factorised - one.products, 1e-9) for one in found]
    factorised_moves, instructions = _two_factors(rows, rest)
    return {
        "products": products, "convolutions": convolutions, "bandwidth": bandwidth, "direct_moves": direct_moves,
        "factorised_moves": factorised_moves, "lanes": lanes, "instructions": instructions,
    }  # fmt: skip


def _padded(channels: int) -> int:
    return -(-channels // 8) * 8


def _two_factors(rows: Iterable[tuple[float, float]], targets: Sequence[float]) -> tuple[float, float]:
    """a, b ≥ 0 of the least squares of relative errors in a·row[0] + b·row[1] ≈ target."""
    scaled = torch.tensor([[x / t, y / t] for (x, y), t in zip(rows, targets, strict=True)], dtype=torch.float64)
    ones = torch.ones(len(scaled), dtype=torch.float64)
    # In units of their own size, since moves and instructions are counted in very different ones.
    norms = scaled.square().sum(0).sqrt()
    both = torch.linalg.lstsq(scaled / norms, ones[:, None], driver="gelsd").solution[:, 0] / norms
    if bool((both >= 0).all()):
        return float(both[0]), float(both[1])
    alone = (scaled * ones[:, None]).sum(0) / scaled.square().sum(0)
    errors = [float((scaled[:, i] * alone[i] - 1).square().sum()) for i in range(2)]
    return (float(alone[0]), 0.0) if errors[0] <= errors[1] else (0.0, float(alone[1]))


def compare(found: Iterable[Measured], machine: Machine) -> list[Choice]:
    """The model's choice for every layer beside the faster way as measured."""
    choices = []
    for one in found:
        predicted = {"direct": machine.direct(*one.figures), "factorised": machine.factorised(*one.figures)}
        measured = {"direct": one.direct, "factorised": one.factorised}
        chosen = min(predicted, key=lambda way: (predicted[way], way == "factorised"))
        faster = min(measured, key=lambda way: measured[way])
        lost = measured[chosen] / measured[faster] - 1
        choices.append(Choice(one.layer, one.element, predicted, measured, chosen, faster, lost))
    return choices


def table(choices: Iterable[Choice]) -> str:
    """A line a layer; milliseconds."""
    lines = ["layer           bytes  direct: predicted  measured  factorised: predicted  measured  chosen      lost"]
    for one in choices:
        times = [1e3 * times[way] for way in ("direct", "factorised") for times in (one.predicted, one.measured)]
        lost = f"{one.lost:.0%}" if one.chosen != one.faster else "-"
        lines.append(
            f"{one.layer:15} {one.element:5}  {times[0]:17.2f}  {times[1]:8.2f}  {times[2]:21.2f}  {times[3]:8.2f}  "
            f"{one.chosen:10}  {lost}"
        )
    return "\n".join(lines)

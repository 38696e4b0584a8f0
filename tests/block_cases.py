"""Features and parameters for the fused blocks, and what their results are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from decovae_kernels import BlockParameters
from tests.channel_cases import DEVICE, arrange

Shape = tuple[int, ...]


def features(shape: Shape, dtype: torch.dtype = torch.float32, layout: str = "contiguous", offset: float = 0) -> Tensor:
    """Channels of different means and scales."""
    generator = torch.Generator().manual_seed(sum(shape))
    scale = torch.rand(shape[1], generator=generator).add(0.5).view(-1, *[1] * (len(shape) - 2))
    x = (torch.randn(shape, generator=generator) + offset + scale) * scale
    return arrange(x.to(DEVICE, dtype), layout).requires_grad_()


def parameter(*shape: int, around: float = 0.0, spread: float = 0.2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * spread + around).to(DEVICE).requires_grad_()


def block_parameters(channels: int, out: int, *, biases: bool = True) -> BlockParameters:
    """With a shortcut where the number of channels changes."""
    shortcut = channels != out
    return BlockParameters(
        parameter(channels, around=1.0),
        parameter(channels, seed=1),
        parameter(out, channels, 3, 3, 3),
        parameter(out, seed=2) if biases else None,
        parameter(out, around=1.0, seed=3),
        parameter(out, seed=4),
        parameter(out, out, 3, 3, 3, seed=5),
        parameter(out, seed=6) if biases else None,
        parameter(out, channels, 1, 1, 1, seed=7) if shortcut else None,
        parameter(out, seed=8) if shortcut and biases else None,
    )


def truth_of(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same leaves in float64."""
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def gradients(y: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor]:
    """Of a weighted sum of `y` that no symmetry cancels."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
    return list(torch.autograd.grad(y, [x for x in leaves if x is not None], weights))


def relative_error(actual: Tensor, truth: Tensor, floor: float = 1e-3) -> float:
    """Norm of the difference over the norm of the truth, or over `floor` if that is larger."""
    actual, truth = actual.detach().double(), truth.detach().double()
    return float((actual - truth).norm() / truth.norm().clamp_min(floor))


def assert_equal_to_reference(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: Sequence[Tensor | None]
) -> None:
    """Value and every gradient within 1e-5 of float64 in float32, and within twice plain torch's own error in 16 bits.

    In 16 bits, plain torch is the reference as it is, on the same parameters rounded alike, as under autocast. A bias
    before a norm has a gradient that cancels: errors are relative to a share of what was summed at the least.
    """
    x = leaves[0]
    assert x is not None
    exact = truth_of(leaves)
    value = reference(*exact)
    truth = [value, *gradients(value, exact)]
    result = ours(*leaves)
    found = [result, *gradients(result, leaves)]
    assert result.dtype == x.dtype
    floor = 0.3 * value.numel() ** 0.5

    def errors(results: Sequence[Tensor]) -> list[float]:
        return [relative_error(a, b, floor) for a, b in zip(results, truth, strict=True)]

    if x.dtype in (torch.float64, torch.float32):
        bounds = [{torch.float64: 1e-12, torch.float32: 1e-5}[x.dtype]] * len(found)
    else:
        rounded = [None if leaf is None else leaf.detach().to(x.dtype).requires_grad_() for leaf in leaves]
        plain = reference(*rounded)
        bounds = [2 * error + 4e-3 for error in errors([plain, *gradients(plain, rounded)])]
    wrong = [
        f"{i}: {e:.1e} > {b:.1e}" for i, (e, b) in enumerate(zip(errors(found), bounds, strict=True)) if not e <= b
    ]
    assert not wrong, f"result, input, parameters in order: {wrong}"

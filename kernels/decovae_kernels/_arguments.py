"""What every fused block asks of the tensors that it is given."""

from __future__ import annotations

import torch


def checked_input(x: torch.Tensor, name: str, *, may_be_empty: bool = False) -> torch.Tensor:
    """`x` (N, C, D, H, W) in the dtype that torch's autocast would convolve it in.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` has another rank, or no elements, unless it may.
    """
    if not x.is_floating_point():
        raise TypeError(f"{name} takes floating-point features, got {x.dtype}")
    if x.ndim != 5:
        raise ValueError(f"{name} takes features of shape (N, C, D, H, W), got {tuple(x.shape)}")
    if x.numel() == 0 and not may_be_empty:
        raise ValueError(f"{name} takes at least one volume of at least one voxel, got {tuple(x.shape)}")
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_norm(name: str, channels: int, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> None:
    """Raise ValueError unless the norm's parameters fit that many channels."""
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups={groups} must divide the {channels} channels")
    for what, parameter in {"weight": weight, "bias": bias}.items():
        if parameter.shape != (channels,):
            raise ValueError(f"{name}: the norm's {what} must have shape ({channels},), got {tuple(parameter.shape)}")


def check_convolution(name: str, channels: int, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> None:
    """Raise ValueError unless the convolution's parameters fit that many input channels."""
    if weight.ndim != 5 or weight.shape[1] * groups != channels:
        raise ValueError(
            f"{name}: a convolution of {channels} channels has a weight (out, {channels // groups}, kD, kH, kW), "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: the convolution's bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward can come: otherwise an operator keeps nothing and works in slabs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

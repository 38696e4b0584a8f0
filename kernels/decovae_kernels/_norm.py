"""Group norm and the activation behind it: what its two implementations are given, and which of them runs."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch

from decovae_kernels._dispatch import wants_triton

Carry: TypeAlias = tuple[torch.Tensor, ...]


class Norm(NamedTuple):
    """Parameters of y = act(γ x̂ + β): γ and β (C,), the number of groups, ε, and whether act is SiLU or nothing."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float
    silu: bool


class Kernels(Protocol):
    """The functions of `group_norm_triton` and `group_norm_torch`, on tensors x (N, C, *spatial)."""

    FOLDS_BIAS: bool
    """Whether a convolution leaves its bias to whoever reads its output next."""

    def normalize(
        self, x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def state(
        self, x: torch.Tensor, statistics: torch.Tensor | None, shift: torch.Tensor | None, norm: Norm
    ) -> torch.Tensor: ...

    def apply(
        self, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def begin_gradient(
        self, grad: torch.Tensor, x: torch.Tensor, state: torch.Tensor, norm: Norm, *, activation: bool
    ) -> tuple[Carry, torch.Tensor]: ...

    def finish_gradient(
        self,
        carry: Carry,
        x: torch.Tensor,
        state: torch.Tensor,
        norm: Norm,
        *,
        other: torch.Tensor | None,
        over: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def add(
        self,
        left: torch.Tensor | None,
        right: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        out: torch.Tensor | None,
        statistics: bool,
    ) -> torch.Tensor: ...


def runs_in_triton(x: torch.Tensor) -> bool:
    """Whether a tensor like `x` goes through the Triton kernels, whose arithmetic is float32."""
    return x.dtype != torch.float64 and wants_triton(x)


def implementation(operation: str, x: torch.Tensor) -> Any:
    """The module that computes `operation` for a tensor like `x`; Triton is imported only where it runs."""
    return importlib.import_module(f"decovae_kernels.{operation}_{'triton' if runs_in_triton(x) else 'torch'}")


def kernels_for(x: torch.Tensor) -> Kernels:
    """The implementation of norms for a tensor like `x`."""
    return cast(Kernels, implementation("group_norm", x))

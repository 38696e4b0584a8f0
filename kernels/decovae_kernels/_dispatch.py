"""Which implementation an operator runs: Triton or torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch._subclasses.fake_tensor import FakeTensor

VARIABLE = "DECOVAE_KERNELS"
CHOICES = ("auto", "triton", "torch")

# Looked up, not imported: Triton has no wheels for macOS and Windows, and its import is slow.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# torch.compile's own CUDA graphs warm up with every allocation in the graph's pool, where a counter that outlives the
# call must not be. Graphs that are captured by hand are no trouble.
UNCAPTURED = (torch.Tag.cudagraph_unsafe,)


def without_memory(x: torch.Tensor) -> bool:
    """Whether `x` has a shape and no content: nothing is launched on it."""
    return isinstance(x, FakeTensor) or x.is_meta


def wants_triton(x: torch.Tensor) -> bool:
    """Whether the environment variable DECOVAE_KERNELS sends a tensor like `x` to Triton.

    `auto` (the default) means Triton for CUDA tensors where Triton is installed and torch elsewhere, `torch` means
    torch everywhere, `triton` means Triton everywhere; on CPU tensors that works in Triton's interpreter only, and on
    fake ones, which are never launched on.

    Raises:
        ValueError: DECOVAE_KERNELS has another value.
        RuntimeError: `triton` was asked for and cannot run on `x`.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r} is unknown: use one of {', '.join(CHOICES)}")
    if choice == "torch":
        return False
    if choice == "auto":
        return x.is_cuda and _TRITON_INSTALLED
    if not _TRITON_INSTALLED:
        raise RuntimeError(f"{VARIABLE}=triton, but Triton is not installed: install it or use {VARIABLE}=auto")
    if not x.is_cuda and not without_memory(x) and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{VARIABLE}=triton cannot run on a tensor on {x.device}: use {VARIABLE}=auto, or set TRITON_INTERPRET=1 "
            "before the first import to run the kernels in Triton's interpreter"
        )
    return True


def full_precision(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Keeps the caller's autocast, which an operator's body still sees, away from the products in it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()

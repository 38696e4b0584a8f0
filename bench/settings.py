"""What a GPU is set to: as in training, for what is timed to say something about it, or for exact results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def training_settings(device: torch.device) -> Iterator[None]:
    """Those of `decovae.runtime.start_runtime`: convolutions chosen by trial, and TensorFloat-32 for float32.

    On a CPU nothing changes, there as here.
    """
    with _settings(device, "high", benchmark=True, allow_tf32=True):
        yield


@contextmanager
def exact_settings(device: torch.device) -> Iterator[None]:
    """Convolutions and products of float32 in float32, and the same bits every time."""
    with _settings(device, "highest", benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def _settings(device: torch.device, precision: str, **convolutions: bool) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.backends.cudnn.flags(enabled=True, **convolutions):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

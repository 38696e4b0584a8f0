"""The settings of training, for whatever is timed elsewhere to say something about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def training_settings(device: torch.device) -> Iterator[None]:
    """Those of `decovae.runtime.start_runtime`: convolutions chosen by trial, and TensorFloat-32 for float32.

    On a CPU nothing changes, there as here.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

"""What every suite sets up around its rows. A suite imports the fixtures that it wants; they apply by themselves."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from bench.scale import COUNT_ONLY, DEVICE


@pytest.fixture(autouse=True)
def clean_slate() -> None:
    """Nothing of one row is left for the next: no tensors, no compiled code, no reserved memory."""
    if not COUNT_ONLY:
        release()


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    """The settings of `decovae.runtime.start_runtime`: convolutions chosen by trial, and TensorFloat-32 for float32."""
    if DEVICE.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        yield
    torch.set_float32_matmul_precision(before)


def release() -> None:
    """Drop what former rows left alive, and give its memory back to the device."""
    # A row that failed lives on in what pytest keeps for a debugger, its tensors with it.
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if DEVICE.type == "cuda":  # elsewhere nothing is counted that they could disturb
        gc.collect()
        torch.cuda.empty_cache()

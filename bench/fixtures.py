"""What every suite sets up around its rows. A suite imports the fixtures that it wants; they apply by themselves."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from bench.scale import COUNT_ONLY, DEVICE
from bench.settings import training_settings


@pytest.fixture(autouse=True)
def clean_slate() -> None:
    """Nothing of one row is left for the next: no tensors, no compiled code, no reserved memory."""
    if not COUNT_ONLY:
        release()


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    """The settings of training."""
    with training_settings(DEVICE):
        yield


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

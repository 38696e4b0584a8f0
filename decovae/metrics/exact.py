"""Arithmetic that measures are taken in, whatever the process trains or decodes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Neither bf16 nor, on a GPU, TF32, and no gradients: a measure must not depend on where it is taken."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":  # a setting of the process: threads that evaluate on the CPU leave it alone
            cudnn = torch.backends.cudnn
            kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
            stack.enter_context(cudnn.flags(enabled=True, allow_tf32=False, **kept))
        yield

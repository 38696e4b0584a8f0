"""Shared set-up: kernels run on the GPU where there is one, in Triton's interpreter where there is none."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when it is first imported, so it is set before any test module is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

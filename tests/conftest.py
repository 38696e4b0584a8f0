"""Shared set-up: kernels run on the GPU where there is one, in Triton's interpreter where there is none."""

from __future__ import annotations

import os

# Workers side by side would each start as many threads as there are cores, and wait for each other in every loop.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

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

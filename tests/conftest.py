"""Shared set-up: kernels run on the GPU where there is one, in Triton's interpreter where there is none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Workers side by side would each start as many threads as there are cores, and wait for each other in every loop.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and stops by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(autouse=True)
def _gpu_as_exact_as_a_cpu() -> Iterator[None]:
    """On a GPU, what tests assume of arithmetic: float32 products and convolutions are that, and repeat their bits.

    Torch starts with TF32 in convolutions, training turns it on in products, and cuDNN may add up in any order. A
    kernel that fails does so while its own test waits for it, not in the middle of a later one.
    """
    if not torch.cuda.is_available():
        yield
        return
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Ends a worker whose CUDA context is lost, as after an illegal access: every later test in it would fail too.

    pytest-xdist has the report by then, says that the worker is gone, and starts another for the remaining tests.
    """
    if report.when == "teardown" and "PYTEST_XDIST_WORKER" in os.environ and not _cuda_works():
        os._exit(1)


def _cuda_works() -> bool:
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

"""The kernels as compiled for the GPUs of the design, none of them needed: no spills, memory 16 bytes at a time."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import platform
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from tests.kernels.compiled import CAPABILITIES, Result, compiled_in_subprocess, describe

CHANNELS = (4, 8, 16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def _latent(channels: int, dtype: str, layout: str) -> torch.Tensor:
    """A batch at the training shape; nothing ever reads or writes it."""
    return torch.empty(2, channels, 24, 24, 24, dtype=DTYPES[dtype]).to(memory_format=FORMATS[layout])


def _decorrelation(channels: int, dtype: str, layout: str) -> None:
    from decovae_kernels import Terms, moments_triton
    from decovae_kernels._layout import readable_blocks

    terms = Terms(covariance=1.0, variance=1.0)
    moments_triton.decorrelation(readable_blocks(_latent(channels, dtype, layout)), terms)


def _input_gradient(channels: int, dtype: str, layout: str) -> None:
    from decovae_kernels import moments_triton
    from decovae_kernels import packed as packing
    from decovae_kernels._layout import readable_blocks

    x = _latent(channels, dtype, layout)
    packed, direction = torch.empty(2, packing.size(channels), dtype=torch.float64)
    out = readable_blocks(torch.empty_like(x))
    moments_triton.input_gradient(readable_blocks(x), packed, direction, torch.empty(()), 1, out=out)


def _latent_head(channels: int, dtype: str, layout: str) -> None:
    from decovae_kernels import latent_head_triton
    from decovae_kernels._layout import readable_blocks

    mu, log_variance, z = (readable_blocks(_latent(channels, dtype, layout)) for _ in range(3))
    latent_head_triton.forward(mu, log_variance, z, torch.empty(1, dtype=torch.int64), 0)


def _latent_head_gradient(channels: int, dtype: str, layout: str) -> None:
    from decovae_kernels import latent_head_triton
    from decovae_kernels import packed as packing
    from decovae_kernels._layout import readable_blocks

    tensors = [readable_blocks(_latent(channels, dtype, layout)) for _ in range(5)]
    packed, direction = torch.empty(2, packing.size(channels), dtype=torch.float64)
    seed = torch.empty(1, dtype=torch.int64)
    latent_head_triton.backward(*tensors, seed, 0, packed, torch.empty(()), direction, 1)


# Host functions, called with every shape, dtype and layout. They launch what they would on a GPU.
HOST_FUNCTIONS: dict[str, Callable[[int, str, str], None]] = {
    "decorrelation": _decorrelation,
    "input_gradient": _input_gradient,
    "latent_head": _latent_head,
    "latent_head_gradient": _latent_head_gradient,
}

# What each kernel does with the large tensors: "" for kernels that only touch a few numbers of it.
STREAMS = {
    "_moments_kernel": "loads",
    "_gradient_kernel": "loads and stores",
    "_loss_kernel": "",
    "_head_kernel": "loads and stores",
    "_head_gradient_kernel": "loads and stores",
}

CASES: dict[str, Callable[[], None]] = {
    f"{name}-C{channels}-{dtype}-{layout}": functools.partial(function, channels, dtype, layout)
    for (name, function), channels, dtype, layout in itertools.product(
        HOST_FUNCTIONS.items(), CHANNELS, DTYPES, FORMATS
    )
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="needs Triton's CUDA tools for Linux on x86-64",
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return compiled_in_subprocess(tmp_path_factory.mktemp("triton"))


def test_every_kernel_is_known(compiled: list[Result]) -> None:
    assert {result.kernel for result in compiled} == set(STREAMS)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_nothing_spills(compiled: list[Result], case: str, capability: int) -> None:
    results = _of(compiled, case, capability)
    assert not [
        f"{r.kernel}: {r.code.stack_bytes} bytes, {r.code.registers} registers" for r in results if r.code.spills
    ]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_the_large_tensor_moves_16_bytes_at_a_time(compiled: list[Result], case: str, capability: int) -> None:
    for result in _of(compiled, case, capability):
        code, loop = result.code, result.code.main_loop
        if "loads" in STREAMS[result.kernel]:
            if loop is not None:
                assert set(loop.loads) == {16}, f"{result.kernel} loops over {describe(loop.loads)}"
            else:
                assert _mostly_wide(code.loads), f"{result.kernel} loads {describe(code.loads)}"
        if "stores" in STREAMS[result.kernel]:
            assert _mostly_wide(code.stores), f"{result.kernel} stores {describe(code.stores)}"


def _of(compiled: list[Result], case: str, capability: int) -> list[Result]:
    results = [result for result in compiled if result.case == case and result.capability == capability]
    assert results, f"{case} launched nothing"
    return results


def _mostly_wide(widths: list[int]) -> bool:
    """Whether 16-byte accesses move most of the bytes."""
    return Counter(widths)[16] * 16 > sum(widths) / 2

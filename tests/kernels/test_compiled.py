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

from tests.kernels.compiled import (
    CAPABILITIES,
    Case,
    CompiledCode,
    Loop,
    Result,
    compiled_in_subprocess,
    describe,
    main,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
STARTS = (0, 1, 13, 2**40)  # samples before a batch's first: another number every step


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
    for start in STARTS:
        latent_head_triton.forward(mu, log_variance, z, torch.empty(1, dtype=torch.int64), 1, start)


def _latent_head_gradient(channels: int, dtype: str, layout: str) -> None:
    from decovae_kernels import latent_head_triton
    from decovae_kernels import packed as packing
    from decovae_kernels._layout import readable_blocks

    tensors = [readable_blocks(_latent(channels, dtype, layout)) for _ in range(5)]
    packed, direction = torch.empty(2, packing.size(channels), dtype=torch.float64)
    seed = torch.empty(1, dtype=torch.int64)
    for start in STARTS:
        latent_head_triton.backward(*tensors, seed, 1, start, packed, torch.empty(()), direction, 1)


def _block(channels: int, dtype: str, layout: str) -> None:
    """Every pass of a residual block's norms and sums, forward and backward; one voxel where channels are few."""
    from decovae_kernels import group_norm_triton as kernels
    from decovae_kernels._norm import Norm

    size = 96 if channels >= 64 else 1

    def tensor() -> torch.Tensor:
        return torch.empty((2, channels, size, size, size), dtype=DTYPES[dtype], memory_format=FORMATS[layout])

    parameter = torch.empty(channels)
    norm = Norm(parameter, parameter, min(channels, 32), 1e-6, True)
    x = tensor()
    statistics = kernels.add(x, tensor(), parameter, out=x, statistics=True)
    _, state = kernels.normalize(x, statistics, parameter, norm)
    carry, _ = kernels.begin_gradient(tensor(), x, state, norm, activation=True)
    kernels.finish_gradient(carry, x, state, norm, other=tensor(), over=True)


def _upsample_conv(channels: int, dtype: str, layout: str) -> None:
    """Both ways' kernels, forward and backward; a small volume, since the products between them are computed."""
    from decovae_kernels import upsample_conv_triton as kernels

    size = 1 if channels == 1 else 4
    low = torch.empty((1, channels, *[size] * 3), dtype=DTYPES[dtype], memory_format=FORMATS[layout])
    high = torch.empty((1, channels, *[2 * size] * 3), dtype=DTYPES[dtype], memory_format=FORMATS[layout])
    weight = torch.empty((channels, channels, 3, 3, 3), dtype=DTYPES[dtype])
    slab = kernels.slab_bytes(low)
    kernels.forward(low, weight, torch.empty(channels), slab)
    kernels.backward(high, low, weight, slab, (True, True))
    kernels.downsample(kernels.upsample(low))


# Host functions, called with every shape, dtype and layout. They launch what they would on a GPU.
HOST_FUNCTIONS: dict[str, Callable[[int, str, str], None]] = {
    "decorrelation": _decorrelation,
    "input_gradient": _input_gradient,
    "latent_head": _latent_head,
    "latent_head_gradient": _latent_head_gradient,
    "block": _block,
    "upsample_conv": _upsample_conv,
}
LATENT = [name for name in HOST_FUNCTIONS if name not in ("block", "upsample_conv")]

# What each kernel does with the large tensors: "" for kernels that only touch a few numbers of it.
STREAMS = {
    "_moments_kernel": "loads",
    "_gradient_kernel": "loads and stores",
    "_loss_kernel": "",
    "_moments_dot_kernel": "",
    "_gradient_dot_kernel": "",
    "_head_kernel": "loads and stores",
    "_head_gradient_kernel": "loads and stores",
    "_add_kernel": "loads and stores",
    "_norm_state_kernel": "",
    "_norm_apply_kernel": "loads and stores",
    "_norm_sums_kernel": "loads and stores",
    "_norm_coefficients_kernel": "",
    "_norm_gradient_kernel": "loads and stores",
    "_gather_kernel": "loads and stores",
    "_spread_kernel": "loads and stores",
    "_upsample_kernel": "stores",  # float32 unrolls its loops
    "_downsample_kernel": "loads and stores",
}

# What training uses: four channels in both layouts and the features of the widest level; and products of more channels
# than registers hold. Every kernel is here.
_BF16 = ("bfloat16",)
FORMS = [
    *itertools.product(LATENT, (4,), _BF16, FORMATS, (CAPABILITIES,)),
    ("decorrelation", 32, "bfloat16", "contiguous", (86,)),
    *itertools.product(("decorrelation", "input_gradient"), (64,), _BF16, ("contiguous",), ((90,),)),
    ("block", 64, "bfloat16", "channels_last", CAPABILITIES),
    # Where sizes are 1, Triton makes constants of them.
    ("block", 1, "float32", "contiguous", (86,)),
    # The paper's two upsampling layers differ from this one in a constant.
    ("upsample_conv", 128, "bfloat16", "channels_last", CAPABILITIES),
]
# What few train with, for one of the cards unless the two differ: it is compiling that takes the time.
# `python -m tests.kernels.compiled` has all.
MORE_FORMS = [
    *itertools.product(LATENT, (4,), ("float32",), FORMATS, ((86,),)),
    *itertools.product(LATENT, (8,), _BF16, FORMATS, ((86,),)),
    *itertools.product(("decorrelation", "input_gradient"), (16,), _BF16, FORMATS, ((86,),)),
    ("decorrelation", 32, "bfloat16", "contiguous", (90,)),
    ("input_gradient", 32, "bfloat16", "contiguous", CAPABILITIES),
    *itertools.product(("decorrelation", "input_gradient"), (64,), _BF16, ("contiguous",), ((86,),)),
    ("block", 256, "bfloat16", "channels_last", (86,)),
    ("block", 128, "float32", "channels_last", (90,)),
    ("block", 64, "bfloat16", "contiguous", (86,)),
    ("upsample_conv", 64, "float32", "channels_last", CAPABILITIES),
    ("upsample_conv", 24, "bfloat16", "contiguous", (86,)),
    ("upsample_conv", 1, "bfloat16", "contiguous", (86,)),
]


def _cases(forms: list[tuple[str, int, str, str, tuple[int, ...]]]) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, channels, dtype, layout, capabilities in forms:
        key = f"{name}-C{channels}-{dtype}-{layout}"
        others = cases[key].capabilities if key in cases else ()
        call = functools.partial(HOST_FUNCTIONS[name], channels, dtype, layout)
        cases[key] = Case(call, (*others, *capabilities), channels)
    return cases


CASES = _cases(FORMS)
EVERY_CASE = _cases([*FORMS, *MORE_FORMS])
COMPILED = [(name, capability) for name, case in CASES.items() for capability in case.capabilities]


def narrow(result: Result, channels: int) -> list[str]:
    """Where a kernel moves the large tensors fewer than 16 bytes at a time; of one channel, there is nothing to say."""
    code, loop, streams = result.code, result.code.main_loop, STREAMS[result.kernel]
    if channels == 1:
        return []
    faults = []
    if "loads" in streams:
        loads = loop.loads if loop else []
        # Gradients of more than 4 channels read their coefficients again for every tile.
        coefficients = channels**2 + 2 * channels if channels > 4 and "gradient" in result.kernel else 0
        if 16 not in loads or len(loads) - loads.count(16) > coefficients:
            faults.append(f"{result.kernel} loops over {describe(loads)}")
    if "stores" in streams and not _mostly_wide(code.stores):
        faults.append(f"{result.kernel} stores {describe(code.stores)}")
    return faults


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


def test_the_command_has_what_is_tested_and_more_each_once() -> None:
    for name, case in EVERY_CASE.items():
        assert len(set(case.capabilities)) == len(case.capabilities) > 0
        assert name not in CASES or set(CASES[name].capabilities) <= set(case.capabilities)
    assert set(CASES) < set(EVERY_CASE)


@pytest.mark.parametrize(
    ("stack_bytes", "loads", "stores", "faults"),
    [
        (0, [16, 16], [16, 4], []),
        (8, [16, 16], [16, 4], ["spills"]),
        (0, [16, 2], [16], ["loops over 16×1 2×1"]),
        (0, [16], [16, 2], ["stores 16×1 2×1"]),
    ],
)
def test_the_command_ends_with_1_where_a_kernel_spills_or_moves_little_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stack_bytes: int,
    loads: list[int],
    stores: list[int],
    faults: list[str],
) -> None:
    code = CompiledCode(
        registers=255, stack_bytes=stack_bytes, local_bytes=0, shared_bytes=0, instructions=9, loads=loads,
        stores=stores, local_accesses=0, calls=0, loops=[Loop(5, loads, stores, 0)], layout_conversions_in_loops=0,
    )  # fmt: skip
    found = [Result("latent_head-C4-bfloat16-contiguous", "_head_kernel", 86, code)]
    monkeypatch.setattr(sys, "argv", ["compiled", "--tested"])
    monkeypatch.setattr("tests.kernels.compiled.compile_cases", lambda *_: found)
    assert main() == len(faults)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"latent_head-C4-bfloat16-contiguous, sm_86: _head_kernel {fault}" for fault in faults]


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("latent_head")])
def test_one_latent_head_serves_every_step(compiled: list[Result], case: str) -> None:
    """Whatever number its batch begins with: a kernel of its own would be compiled in the midst of training."""
    for capability in CAPABILITIES:
        first, *others = _of(compiled, case, capability)
        assert len(others) == len(STARTS) - 1
        assert all(other.kernel == first.kernel and other.code == first.code for other in others)


@pytest.mark.parametrize(("case", "capability"), COMPILED)
def test_nothing_spills(compiled: list[Result], case: str, capability: int) -> None:
    results = _of(compiled, case, capability)
    assert not [
        f"{r.kernel}: {r.code.stack_bytes} bytes, {r.code.registers} registers" for r in results if r.code.spills
    ]


@pytest.mark.parametrize(("case", "capability"), COMPILED)
def test_the_large_tensors_move_16_bytes_at_a_time(compiled: list[Result], case: str, capability: int) -> None:
    assert not [fault for result in _of(compiled, case, capability) for fault in narrow(result, CASES[case].channels)]


def _of(compiled: list[Result], case: str, capability: int) -> list[Result]:
    results = [result for result in compiled if result.case == case and result.capability == capability]
    assert results, f"{case} launched nothing"
    return results


def _mostly_wide(widths: list[int]) -> bool:
    """Whether 16-byte accesses are the most; the others write the few numbers of a program's own result."""
    counts = Counter(widths)
    return counts[16] > 0 and counts[2] == 0 and counts[4] <= 4

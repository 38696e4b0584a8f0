"""A row: what it states, how it is timed, and what else is noted of it. All suites measure by this."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import measure, scale
from bench.fixtures import release
from bench.floors import Counting, Floor
from bench.measure import Run
from bench.scale import DEVICE, ON_CPU
from decovae.training.live_memory import SavedForBackward

MOST_ROUNDS = 2000

OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate")
"""In the words of CUDA and Triton, of cuDNN and cuBLAS, and of torch on a CPU."""

NO_PLAN = ("unable to find an engine", "unable to find a valid cudnn algorithm")
"""In torch's words, lower-case: none of cuDNN's ways to convolve ran. Mostly because none got its workspace."""

SHORT_OF_MEMORY = 1 / 8
"""Of a device's memory, or four of a row's largest features: with less of it free, no plan means no workspace."""


@dataclass(frozen=True)
class Row:
    """One implementation of a subject at one shape.

    Attributes:
        suite: the table that it stands in.
        subject: what it computes.
        name: of the implementation; the part behind the last dash may be "compiled".
        shape: of what goes in.
        dtype: of what goes in, and of the products.
        direction: "forward", "forward+backward", or "step", which also changes the weights.
        features: elements of the largest features in it, the size that a copy is compared at.
        channels_last: layout of what goes in, and of the parameters.
        layout: that layout, if it makes another case and not another implementation.
    """

    suite: str
    subject: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    features: int
    channels_last: bool = False
    layout: str | None = None

    @property
    def backward(self) -> bool:
        return self.direction != "forward"

    @property
    def compiled(self) -> bool:
        return self.name.endswith("compiled")

    @property
    def case(self) -> dict[str, str]:
        """What rows state that are to be compared."""
        layout = {} if self.layout is None else {"layout": self.layout}
        shape = "x".join(map(str, self.shape))
        dtype = _name(self.dtype)
        return {
            "suite": self.suite,
            "subject": self.subject,
            "shape": shape,
            "dtype": dtype,
            **layout,
            "direction": self.direction,
        }

    @property
    def counting(self) -> Counting:
        return Counting(self.dtype.itemsize, self.backward)

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, in this row's layout."""
        return tensor.to(DEVICE).contiguous(memory_format=self.memory_format)

    def placed(self, module: nn.Module) -> nn.Module:
        """A module on the device, its convolutions' weights in this row's layout."""
        module = module.to(DEVICE)
        return module.to(memory_format=self.memory_format) if self.channels_last else module

    @property
    def autocast(self) -> torch.dtype:
        """Dtype of the products where parameters are float32: that of the row, but where an option asks for its own."""
        return torch.float16 if "float16" in self.name else self.dtype

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last_3d if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Work:
    """What a row does, ready to be done any number of times.

    Attributes:
        run: one call, which need not wait for the device.
        result_bytes: of what it returns.
        held: bytes that are there between calls: parameters, what goes in, an optimizer's moments.
        saved: bytes that a forward keeps for backward, if that can be asked.
        count: the call as it may be watched operator by operator; None if it is compiled.
        launches: note launches, or on a CPU operators: for work so small that they are most of it.
        graphs: calls replay CUDA graphs, whose memory was taken when they were recorded.
        beside: tensors that only take room, counted in `held`.
    """

    run: Run
    result_bytes: int
    held: int
    saved: Callable[[], int] | None = None
    count: Run | None = None
    launches: bool = False
    graphs: bool = False
    beside: Sequence[Tensor] = ()


def measured(
    benchmark: Any,
    row: Row,
    floor: Floor,
    build: Callable[[], Work],
    *,
    seconds: float = 0.5,
    rounds: int | None = None,
    exhausted: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """State a row's case and floors, time it, and note what it needs beside time.

    A row whose memory ends, wherever in this, is skipped as one that does not fit.

    Args:
        benchmark: pytest-benchmark's fixture.
        row: what is measured.
        floor: the least that has to be moved and multiplied.
        build: makes the work; not called where rows are only counted.
        seconds: how long calls are repeated, at least `scale.LEAST_ROUNDS` times.
        rounds: how often, in place of that.
        exhausted: called where memory ended, before the row is skipped.

    Returns:
        What was noted; None where rows are only counted.
    """
    benchmark.extra_info |= {
        **row.case,
        "implementation": row.name,
        "bytes_moved_floor": floor.bytes_moved,
        "flops_floor": floor.flops,
        "matrix_dtype": _name(row.dtype) if floor.flops else None,
    }
    benchmark.group = " ".join(row.case.values())
    if scale.COUNT_ONLY:
        return None
    skip_what_cannot_run(row)
    lacking: str | None = None
    try:
        benchmark.extra_info |= _measured(benchmark, row, floor, build, seconds, rounds)
    except RuntimeError as error:
        lacking = _lacking(error, row)
        if lacking is None:
            raise
    if lacking is not None:  # here, where the error no longer holds the tensors of those who saw it
        exhausted()
        release()
        free = (measure.available_memory(DEVICE) or 0) / 1e9
        pytest.skip(f"does not fit: {free:.1f} GB are free on {DEVICE.type}{lacking}")
    noted: dict[str, Any] = benchmark.extra_info
    return noted


def _measured(
    benchmark: Any, row: Row, floor: Floor, build: Callable[[], Work], seconds: float, rounds: int | None
) -> dict[str, Any]:
    measure.warm_profiler(DEVICE)
    # Before the work takes the memory that they need.
    copying = measure.copy_bandwidth(row.features, row.dtype, DEVICE)
    multiplying = measure.matrix_rate(row.dtype, DEVICE) if floor.flops else None
    others = measure.reserved(DEVICE)
    work = _begun(build, calls=benchmark.enabled)

    def run_to_the_end() -> None:
        work.run()
        measure.synchronise(DEVICE)

    if benchmark.enabled:
        rounds = rounds or enough_rounds(run_to_the_end, seconds)
    retries = measure.allocator_retries(DEVICE)
    benchmark.pedantic(run_to_the_end, rounds=rounds or 1)
    if retries is not None:
        benchmark.extra_info["allocator_retries"] = (measure.allocator_retries(DEVICE) or 0) - retries
        benchmark.extra_info["gpu"] = measure.clocks(work.run, DEVICE)
    memory = measure.memory(work.run, DEVICE, work.result_bytes)
    peak = work.held + work.result_bytes + memory.peak_extra
    if work.graphs and memory.reserved is not None:
        peak = memory.reserved - others  # a replay allocates nothing, so that torch's allocations say too little
    watch = work.count if work.launches and ON_CPU else None
    info = {
        "copy_bytes_per_second": copying,
        "matrix_flops_per_second": multiplying,
        "peak_extra_bytes": peak - work.held - work.result_bytes,
        "peak_bytes": peak,
        "reserved_bytes": memory.reserved,
        "saved_bytes": work.saved() if work.saved else None,
        "flops": measure.arithmetic(work.count) if work.count and floor.flops else None,
        "launches": measure.launches(work.run) if work.launches and not ON_CPU else None,
        "operators": measure.operators(watch) if watch else None,
    }
    if benchmark.stats is not None:
        info["share_of_floor"] = measure.share_of_floor({**benchmark.extra_info, **info}, benchmark.stats.stats.median)
    return info


def _begun(build: Callable[[], Work], *, calls: bool) -> Work:
    """The work, if wanted behind its first call, which compiles, tunes and fills caches.

    A second time if cuDNN found no way to convolve: what was cached before may have been in its way.
    """

    def begin() -> Work:
        work = build()
        if calls:
            work.run()
            measure.synchronise(DEVICE)
        return work

    try:
        return begin()
    except RuntimeError as error:
        if not found_no_plan(error):
            raise
    release()
    return begin()


def _lacking(error: RuntimeError, row: Row) -> str | None:
    """What else there is to say where an error is about memory that ended; None if it is about something else."""
    if ran_out_of_memory(error):
        return ""
    if found_no_plan(error) and measure.is_short(DEVICE, SHORT_OF_MEMORY, 4 * row.features * row.dtype.itemsize):
        return ", and cuDNN found no way to convolve"
    return None


def found_no_plan(error: RuntimeError) -> bool:
    """Whether cuDNN ran none of its ways to convolve."""
    return any(said in str(error).lower() for said in NO_PLAN)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ended: torch's own allocator says so by a type, libraries below it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in OUT_OF_MEMORY)


def enough_rounds(run: Run, seconds: float) -> int:
    """How many calls take so long."""
    return min(MOST_ROUNDS, max(scale.LEAST_ROUNDS, math.ceil(scale.seconds(seconds) / measure.duration(run))))


def skip_what_cannot_run(row: Row) -> None:
    """Skip what this machine lacks something for."""
    if row.name == "liger":
        if ON_CPU:
            pytest.skip("Liger-Kernel's GroupNorm is a Triton kernel: needs CUDA")
        pytest.importorskip("liger_kernel", reason="needs Liger-Kernel: pip install -e '.[bench]'")
    if row.name == "lightly":
        pytest.importorskip("lightly", reason="needs lightly: pip install -e '.[bench]'")
    if row.compiled and ON_CPU and not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")


def compiled(module: nn.Module, *, fullgraph: bool = True) -> nn.Module:
    result: nn.Module = torch.compile(module, fullgraph=fullgraph, dynamic=False)  # type: ignore[assignment]
    return result


def own_layout(name: str) -> bool:
    """Whether an implementation that may choose runs channels-last."""
    return "channels-last" in name or not (ON_CPU or "contiguous" in name or name.startswith("monai"))


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def module_work(row: Row, module: nn.Module, x: Tensor, *, beside: Sequence[Tensor] = ()) -> Work:
    """A module's forward, or its gradients too, as the row's direction says.

    Args:
        row: what is measured.
        module: takes `x`, and gives features or a loss.
        x: on the device; wants its gradient if that is part of the work.
        beside: tensors that only take room.
    """
    mixed = any(parameter.dtype != row.dtype for parameter in module.parameters())
    wanted = [tensor for tensor in (x, *module.parameters()) if tensor.requires_grad]
    along: Tensor | None = None
    held = [x, *module.parameters(), *module.buffers(), *beside]

    def forward(given: Tensor = x) -> Tensor:
        with torch.autocast(DEVICE.type, row.autocast, enabled=mixed):
            y: Tensor = module(given)
        return y

    def run(given: Tensor = x) -> Any:
        if row.backward:
            return torch.autograd.grad(forward(given), wanted, along)
        with torch.no_grad():
            return forward(given)

    def saved() -> int:
        with SavedForBackward(module) as kept:
            forward()
        return kept.activations

    with torch.set_grad_enabled(row.backward):
        y = forward()
    if y.ndim > 0 and row.backward:
        along = torch.randn_like(y)
        held.append(along)
    return Work(
        run,
        result_bytes=bytes_of(*wanted) if row.backward else y.nbytes,
        held=bytes_of(*held),
        saved=saved if row.backward else None,
        # Generated code bypasses the dispatcher, and compilation refuses to run under a mode that would watch it.
        # A view, because the counter's hooks refuse a leaf whose gradient is asked for.
        count=None if row.compiled else lambda: run(x.view_as(x)),
        beside=beside,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What a row states beside its time: bytes, bandwidth, arithmetic, launches or operators, memory.

Everything here runs before or after the timing, in calls of its own, so that no count slows the call that is timed.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from decovae.rates import synchronise as synchronise

Run = Callable[[], object]


def bytes_moved_floor(mu_bytes: int, direction: str) -> int:
    """The least a loss can move: forward reads μ once, forward+backward reads it twice and writes its gradient.

    The backward needs statistics of all of μ before its first element, hence the second read. What is C or C² numbers
    is left out.
    """
    return mu_bytes * (1 if direction == "forward" else 3)


LARGEST_COPY = 1 << 30
"""Bytes beyond which a copy gets no faster, but takes memory that a row may need."""


def copy_bandwidth(elements: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes read plus bytes written a second by `copy_` between two buffers of so many elements, the median of many.

    A copy is timed as a row is, from the call until the device is done: at small sizes both are mostly launches, and a
    share of it compares those. Both buffers exist before, whereas on a CPU a large gradient comes in fresh pages, which
    the system clears first. A forward only reads and can exceed 1 of this. Buffers are at most `LARGEST_COPY` bytes
    large.
    """
    return _copy_bandwidth(min(elements, LARGEST_COPY // dtype.itemsize), dtype, device)


@functools.cache
def _copy_bandwidth(elements: int, dtype: torch.dtype, device: torch.device) -> float:
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


@functools.cache
def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large square matrix product, the median of many."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(left)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(left, right, out=product), device)


def duration(run: Run) -> float:
    """Seconds of one call, which waits for its device by itself."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _median_seconds(run: Run, device: torch.device) -> float:
    def run_to_the_end() -> None:
        run()
        synchronise(device)

    run_to_the_end()  # what a library sets up, and pages that are touched for the first time
    seconds: list[float] = []
    while len(seconds) < 7 or sum(seconds) < 0.2:
        seconds.append(duration(run_to_the_end))
    return statistics.median(seconds)


def arithmetic(run: Run) -> int:
    """Floating-point operations of the matrix products and convolutions in one call, what runs twice counted twice."""
    with FlopCounterMode(display=False) as count:
        run()
    return int(count.get_total_flops())


def launches(run: Run) -> int:
    """Kernels, copies and fills that one call puts on a CUDA device."""
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in _trace(run))


def operators(run: Run) -> int:
    """ATen operators that one call dispatches on a CPU, views included, forward and backward.

    Composite operators count as what they decompose into. A custom operator counts as the ATen operators in it, or as
    one if it has none.
    """
    with _OperatorCount() as count:
        run()
    return count.total


def warm_profiler(device: torch.device) -> None:
    """Attach the profiler to this process's CUDA once: calls cost more from then on, and should in all rows alike."""
    if device.type == "cuda":
        _warm_profiler(device)


@functools.cache
def _warm_profiler(device: torch.device) -> None:
    launches(lambda: torch.zeros(1, device=device))


def reserved(device: torch.device) -> int:
    """Bytes that torch's CUDA allocator cannot give back: what is alive, in whole segments, and CUDA graphs' pools."""
    if device.type != "cuda":
        return 0
    synchronise(device)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def allocator_retries(device: torch.device) -> int | None:
    """How often so far torch gave cached memory back to a CUDA device and asked again; None elsewhere."""
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else None


def clocks(run: Run, device: torch.device) -> dict[str, Any] | None:
    """What `decovae.machine.reading` says of a GPU while it works at one more call; None elsewhere."""
    if device.type != "cuda":
        return None
    from decovae.machine import reading

    result = run()
    found = reading()
    synchronise(device)
    del result
    return found


class Memory(NamedTuple):
    """What one call took.

    Attributes:
        peak_extra: the highest level of torch's allocations during the call, above what was allocated before it, less
            its result: what has to be free beyond the arguments and the result. Workspaces that a BLAS allocates by
            itself are not torch's and not in it; nor is what a CUDA graph keeps between calls.
        reserved: the most that torch's allocator held of a GPU during the call, with all that was there before it,
            after everything that was not in use had been given back; None on a CPU.
    """

    peak_extra: int
    reserved: int | None


def memory(run: Run, device: torch.device, result_bytes: int) -> Memory:
    """What one call takes; `result_bytes` is the size of what it returns, of a gradient for example."""
    if device.type == "cuda":
        synchronise(device)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        extra = torch.cuda.max_memory_allocated(device) - before - result_bytes
        return Memory(extra, torch.cuda.max_memory_reserved(device))
    level = peak = 0
    for event in sorted((e for e in _trace(run) if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return Memory(peak - result_bytes, None)


def floor_seconds(
    info: Mapping[str, Any], bytes_per_second: float, flops_per_second: float | None
) -> tuple[float, str]:
    """The least time of a row, and which of bytes and operations takes it."""
    moving = info["bytes_moved_floor"] / bytes_per_second
    products = info.get("flops_floor") or 0
    multiplying = products / flops_per_second if products and flops_per_second else 0.0
    return (float(multiplying), "operations") if multiplying > moving else (float(moving), "bytes")


def share_of_floor(info: Mapping[str, Any], median: float) -> float:
    """The least time over the median: bytes at a copy's bandwidth, or products at their rate, whichever is more.

    Args:
        info: a row's ``bytes_moved_floor`` and ``copy_bytes_per_second``, and with products ``flops_floor`` and
            ``matrix_flops_per_second``.
        median: seconds of a call.
    """
    return floor_seconds(info, info["copy_bytes_per_second"], info["matrix_flops_per_second"])[0] / median


def available_memory(device: torch.device) -> int | None:
    """Free bytes for tensors on `device`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def is_short(device: torch.device, share: float, least: int) -> bool:
    """Whether less of a CUDA device's memory is free than this share of it, or than so many bytes."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free < max(share * total, least)


def _trace(run: Run) -> list[dict[str, Any]]:
    # The exported trace, because its categories and memory events are documented; the profiler's objects are not.
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


class _OperatorCount(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.total
        with self:  # off while it handles an operator, so on again for what that operator calls
            if func.namespace in ("aten", "prim"):
                result = func.decompose(*args, **kwargs)
            else:
                # Past this mode's own key, where the call would come back here.
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                result = func.redispatch(keys, *args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if self.total == before:
            self.total += 1
        return result

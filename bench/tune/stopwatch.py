"""Seconds of GPU work, between CUDA events that the host is ahead of, so that its own time is not in them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

Run = Callable[[], object]

_SAMPLE_SECONDS = 1e-3
_MOST_CALLS = 64
# More than any of these cards makes in a second; `torch.cuda._sleep` counts cycles.
_CYCLES_A_SECOND = 2.1e9
_LONGEST_SLEEP = 0.05


def input_sets(bytes_moved: int, device: torch.device) -> int:
    """How many inputs to take in turn, so that none is found in the L2 cache that would not be there in training.

    One where a call sweeps the cache anyway, and one where inputs are so small that they are still there in training.
    """
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    if bytes_moved < cache / 8:
        return 1
    return max(1, min(math.ceil(4 * cache / bytes_moved), 16))


def seconds(runs: Sequence[Run], calls: int) -> float:
    """Of one call: the mean of `calls`, of `runs` in turn."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # The device waits while the host launches: as long as that took the last time, and half as long again.
    torch.cuda._sleep(int(min(1.5 * _host_seconds(runs, calls), _LONGEST_SLEEP) * _CYCLES_A_SECOND))
    start.record()
    for call in range(calls):
        runs[call % len(runs)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _host_seconds(runs: Sequence[Run], calls: int) -> float:
    begun = time.perf_counter()
    runs[0]()
    taken = time.perf_counter() - begun
    torch.cuda.synchronize()
    return calls * taken


def calls_for(runs: Sequence[Run]) -> int:
    """How many calls a sample needs to last a millisecond."""
    once = seconds(runs, 4)
    return max(1, min(math.ceil(_SAMPLE_SECONDS / max(once, 1e-7)), _MOST_CALLS))

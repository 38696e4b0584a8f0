"""What figures of a run's speed tell a person to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from decovae.training.config import AdversarialConfig, RunConfig
from decovae.training.sensors import reasons

LOADER = 0.2
"""Share of a step that waiting for data is worth a warning from."""

COMMUNICATION = 0.3
"""The same of waiting for other processes."""

FULL = 0.95
"""The same of a GPU's memory that is taken."""

BEHIND = 1.2
"""How many times as long as the others' a process's own work takes for it to be called slow."""


def advice(
    figures: Mapping[str, float], everywhere: Mapping[str, Sequence[float]], config: RunConfig
) -> Iterator[tuple[str, str]]:
    """What is worth a warning: what it is about, and one sentence.

    Args:
        figures: means over processes, see `Telemetry.read`.
        everywhere: of each figure every process's value, NaN where it has none.
        config: the run's.
    """
    step = figures["seconds_per_step"]
    if step <= 0:
        return
    data = max(everywhere["seconds_data"]) / step
    if data > LOADER:
        workers = (
            f"raise --data.workers (now {config.data.workers})" if config.data.workers < 16 else "use faster storage"
        )
        yield "data", f"the loader is the bottleneck: {data:.0%} of the step; {workers}."
    communication = figures["seconds_communication"] / step
    slow = _behind(everywhere)
    if slow is not None:
        rank, ratio = slow
        yield "behind", f"process {rank} is slow: its own work takes {ratio:.1f} times as long as the others'."
    elif communication > COMMUNICATION and len(everywhere["seconds_data"]) > 1:
        yield (
            "communication",
            f"waiting for other processes takes {communication:.0%} of the step; raise --optimizer.accumulation (now "
            f"{config.optimizer.accumulation}), or see which network is used (NCCL_DEBUG=INFO says so).",
        )
    for rank, share in enumerate(everywhere["memory_share"]):
        if share > FULL:
            yield "memory", f"the GPU's memory is {share:.0%} full{_of(rank, everywhere)}; {_smaller(config)}."
            break
    retries = max((count for count in everywhere["allocator_retries"] if count > 0), default=0.0)
    if retries:
        yield (
            "retries",
            f"memory had to be given back and asked for again {retries:.0f} times, which stops the GPU; "
            f"{_smaller(config)}, or set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.",
        )
    for rank, bits in enumerate(everywhere["slowed"]):
        if bits > 0:
            because = ", ".join(reasons(int(bits)))
            yield (
                "slowed",
                f"the GPU's clocks are lowered{_of(rank, everywhere)} ({because}); see to cooling and power.",
            )
            break


def _behind(everywhere: Mapping[str, Sequence[float]]) -> tuple[int, float] | None:
    """The process whose work between waits takes longest, and how many times the others' median, if that is much."""
    own = [
        whole - waiting
        for whole, waiting in zip(everywhere["seconds_per_step"], everywhere["seconds_communication"], strict=True)
    ]
    if len(own) < 2:
        return None
    rank = max(range(len(own)), key=own.__getitem__)
    others = statistics.median(own[:rank] + own[rank + 1 :])
    return (rank, own[rank] / others) if others > 0 and own[rank] > BEHIND * others else None


def _of(rank: int, everywhere: Mapping[str, Sequence[float]]) -> str:
    return f" of process {rank}" if len(everywhere["seconds_per_step"]) > 1 else ""


def _smaller(config: RunConfig) -> str:
    if isinstance(config, AdversarialConfig) and config.memory == "balanced":
        return "take --memory tight, or a smaller --data.batch-size with more --optimizer.accumulation"
    return "take a smaller --data.batch-size with more --optimizer.accumulation"

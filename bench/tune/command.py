"""The command behind `python -m bench.tune`: classes in the order of their weight, as long as the time lasts."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.measure import copy_bandwidth, duration
from bench.settings import training_settings
from bench.tune import cost, measure, record, stopwatch
from bench.tune.candidates import classes
from bench.tune.catalogue import ORDER
from decovae import machine
from decovae.errors import InputError, RunError
from decovae_kernels import configurations
from decovae_kernels.upsample_conv_cost import parse_machine

COST = "cost"
CHOICES = (*ORDER, COST)
_BANDWIDTH_ELEMENTS = 1 << 28
_COST_REPEATS = 5
_COST_CALLS = 3


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code.

    Raises:
        InputError, RunError: as their messages say.
    """
    tiny: bool = options.tiny
    if tiny and options.write:
        raise InputError("--write: the data are measured on a GPU, and here is none to measure; leave it out.")
    if not options.minutes > 0:
        raise InputError(f"--minutes {options.minutes}: must be more than 0.")
    if unknown := set(options.only or ()) - set(CHOICES):
        raise InputError(f"--only {' '.join(sorted(unknown))}: no such kernel; choose from {' '.join(CHOICES)}.")
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    architecture = configurations.architecture(device)
    if not tiny and architecture == configurations.DEFAULT:
        raise InputError("bench.tune: the data name NVIDIA's architectures alone, and this is another maker's GPU.")
    found = record.resumed(options.out, "tiny" if tiny else "gpu", architecture)
    deadline = time.monotonic() + 60 * options.minutes
    wanted = options.only or CHOICES
    failed = False
    if tiny:
        failed = _check(found, wanted, deadline, options.out)
    else:
        with training_settings(device):
            _tune(found, wanted, deadline, options.out, device)
    if options.write:
        for path in record.write_data(found):
            print(f"wrote {path}")
    return int(failed)


def _check(found: record.Record, wanted: Sequence[str], deadline: float, out: Path | None) -> bool:
    """Every candidate once, in the interpreter; whether one failed."""
    failed = False
    for kind in classes():
        if kind.kernel not in wanted or kind.name in found.classes:
            continue
        if time.monotonic() > deadline:
            print("out of time; the same command with --out goes on")
            return failed
        entry = measure.check_all(kind, found.architecture, print)
        discarded = sum(candidate["discarded"] is not None for candidate in entry["candidates"])
        print(f"{kind.name}: {len(entry['candidates'])} candidates, {discarded} failed", flush=True)
        found.classes[kind.name] = entry
        failed = failed or discarded > 0
        _save(found, out)
    if COST in wanted and found.cost is None:
        _fit(found, cost.TINY, torch.device("cpu"), duration, bandwidth=1e10, lanes=1e12)
        _save(found, out)
    return failed


def _tune(found: record.Record, wanted: Sequence[str], deadline: float, out: Path | None, device: torch.device) -> None:
    """Measure what is wanted until the time is over.

    Raises:
        RunError: a candidate cost this process the GPU, or the cost model cannot be fitted.
    """
    if COST in wanted and found.cost is None:
        _fit(found, cost.LAYERS, device, _median_gpu_seconds, bandwidth=_bandwidth(device), lanes=_lanes(device))
        _save(found, out)
    for kind in classes():
        if kind.kernel not in wanted or kind.name in found.classes:
            continue
        if time.monotonic() > deadline:
            print("out of time; the same command with --out goes on")
            return
        begun = time.monotonic()
        try:
            entry = measure.tune(kind, found.architecture, device, found.fatal)
        except measure.Discarded as reason:
            print(f"{kind.name}: left as it is: {reason}", flush=True)
            continue
        except measure.Fatal as loss:
            found.fatal.append({"class": kind.name, "use": asdict(loss.use), "reason": loss.reason})
            _save(found, out)
            raise RunError(
                f"{kind.name}: {loss.use} cost this process the GPU ({loss.reason}); the same command with --out "
                "goes on without it."
            ) from loss
        found.classes[kind.name] = entry
        _save(found, out)
        print(f"{kind.name}: {_told(entry)} ({time.monotonic() - begun:.0f} s)", flush=True)


def _told(entry: dict[str, object]) -> str:
    candidates = entry["candidates"]
    assert isinstance(candidates, list)
    alive = [candidate for candidate in candidates if candidate["discarded"] is None]
    chosen = next(candidate for candidate in alive if candidate["use"] == entry["chosen"])
    first = candidates[0]
    kept = f"{len(alive)} of {len(candidates)} candidates timed"
    if not entry["changed"]:
        return f"{kept}, none faster than today's"
    if first["discarded"] is not None:
        return f"{kept}, the fastest is {entry['chosen']}; today's is none ({first['discarded']})"
    return f"{kept}, {entry['chosen']} saves {chosen['verdict']['gain']:.0%} of {entry['present']}"


def _fit(
    found: record.Record,
    layers: Mapping[str, tuple[tuple[int, ...], int]],
    device: torch.device,
    clock: Callable[[Callable[[], object]], float],
    *,
    bandwidth: float,
    lanes: float,
) -> None:
    """Measure the layers, fit the cost model, and say where it would choose wrongly."""
    measured, left_out = [], []
    for dtype in cost.DTYPES:
        for name, (sizes, channels) in layers.items():
            try:
                measured.append(cost.measure(name, sizes, channels, dtype, device, clock))
            except torch.OutOfMemoryError:
                left_out.append(f"{name}, {dtype}: does not fit this card")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    try:
        fitted = cost.fit(measured, bandwidth, lanes)
    except ValueError as error:
        raise RunError(f"{COST}: {error}; a card with more free memory is needed.") from error
    choices = cost.compare(measured, parse_machine({**fitted, "chosen": "fitted just now"}, COST))
    print(cost.table(choices), flush=True)
    found.cost = {
        "measured": [asdict(one) for one in measured],
        "left_out": left_out,
        "fitted": fitted,
        "choices": [choice._asdict() for choice in choices],
    }


def _median_gpu_seconds(run: Callable[[], object]) -> float:
    run()
    return statistics.median(stopwatch.seconds([run], _COST_CALLS) for _ in range(_COST_REPEATS))


def _bandwidth(device: torch.device) -> float:
    return copy_bandwidth(_BANDWIDTH_ELEMENTS, torch.bfloat16, device)


def _lanes(device: torch.device) -> float:
    """Instructions of single threads a second, by multiprocessors and the highest clock that the driver states."""
    properties = torch.cuda.get_device_properties(device)
    clock = machine.describe().get("gpu_max_sm_clock_mhz") or 1700
    return properties.multi_processor_count * 128 * float(clock) * 1e6


def _save(found: record.Record, out: Path | None) -> None:
    if out is not None:
        found.save(out)

"""One class of launches: every candidate checked against the configuration of today, then all timed in turn.

Today's is believed because it agrees with plain torch at a tiny size. Where it does not, or does not run at all, the
first candidate that does is what the others are compared with, and the fastest of them takes its place.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.tune import judge, stopwatch
from bench.tune.candidates import Class, candidates, code_of, refused
from bench.tune.catalogue import FUNCTIONS
from bench.tune.work import Prepared, Tensors, Work
from decovae_kernels._launch import recorded
from decovae_kernels.configurations import Configuration, trying

REPEATS = 9
# Of float32 results that are summed in another order; of numbers rounded to 16 bits, where the last bit may differ.
_TOLERANCES = {torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Products of other sizes may be rounded otherwise: to bfloat16, and in float32 from factors that TensorFloat-32 cut to
# 11 bits, which leaves 4e-4.
_SLAB_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 1e-2}

FATAL = ("CUDA error", "illegal memory access", "device-side assert", "misaligned address")


class Discarded(Exception):
    """A candidate that is none, and why."""


class Fatal(Exception):
    """A candidate after which this process cannot use the GPU any more."""

    def __init__(self, use: Configuration, reason: str) -> None:
        super().__init__(reason)
        self.use, self.reason = use, reason


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where what is found is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    # Piece by piece: in float64 all at once, a large volume would not fit beside its inputs.
    difference = size = 0.0
    for a, b in zip(found.reshape(-1).split(1 << 26), expected.reshape(-1).split(1 << 26), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    error = (difference / max(size, 1e-60)) ** 0.5
    return error if error == error else float("inf")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an element that a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    filling = settings.fill_uninitialized_memory
    with warnings.catch_warnings():
        # Of operators that have no deterministic form, which are not what is wanted here.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            settings.fill_uninitialized_memory = filling


@contextlib.contextmanager
def _attempt(use: Configuration) -> Iterator[None]:
    """Whatever Triton, its assembler and the driver raise for `use`, as one of these.

    Raises:
        Discarded: it does not compile or does not run.
        Fatal: the GPU is lost to this process.
    """
    try:
        yield
    except (torch.OutOfMemoryError, Discarded):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if any(sign in str(error) for sign in FATAL):
            raise Fatal(use, reason) from error
        raise Discarded(f"does not run: {reason}") from error


def check(
    work: Work, use: Configuration, prepared: Prepared, expected: Tensors, *, spilling: bool = False
) -> dict[str, Any]:
    """How far the results of this configuration are from those expected, and what was launched for them.

    Args:
        spilling: whether it may spill.

    Raises:
        Discarded: it does not compile, spills, is not launched, or computes something else.
        Fatal: the GPU is lost to this process.
    """
    with _attempt(use), trying(work.kernel, use), poisoned_memory(), recorded() as launches:
        found = prepared.comparable(prepared.run())
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    own = [launch for launch in launches if launch.kernel == FUNCTIONS.get(work.kernel)]
    if work.kernel in FUNCTIONS and not own:
        raise Discarded(f"launched no {FUNCTIONS[work.kernel]}")
    tolerance = (_SLAB_TOLERANCES if work.kernel == "slab" else _TOLERANCES)[work.dtype]
    if max(errors) > tolerance:
        raise Discarded(f"{work.id}: differs by {max(errors):.1e}, more than {tolerance:.0e}")
    facts: dict[str, Any] = {"error": max(errors)}
    for launch in own[:1]:
        if launch.options["num_warps"] != asdict(use)["warps"]:
            raise Discarded(f"{work.id}: was launched with {launch.options['num_warps']} warps")
        spilled = getattr(launch.compiled, "n_spills", None)
        facts |= {
            "grid": list(launch.grid), "registers": getattr(launch.compiled, "n_regs", None), "spilled_bytes": spilled,
        }  # fmt: skip
        if spilled and not spilling:
            raise Discarded(f"{work.id}: spills {spilled} bytes")
    return facts


def check_all(kind: Class, architecture: str, report: Callable[[str], None]) -> dict[str, Any]:
    """Every candidate of the class at tiny sizes on the CPU, against plain torch."""
    present = kind.present(architecture)
    tiny = list(dict.fromkeys(work.tiny() for work in kind.works))
    prepared = [work.prepare(torch.device("cpu")) for work in tiny]
    expected = [found.expected() for found in prepared]
    entries = []
    for use in candidates(kind.kernel, present):
        entry: dict[str, Any] = {"use": asdict(use), "discarded": None, "launches": {}}
        try:
            for work, inputs, outcome in zip(tiny, prepared, expected, strict=True):
                entry["launches"][work.id] = check(work, use, inputs, outcome)
        except Discarded as reason:
            entry["discarded"] = str(reason)
            report(f"{kind.name} {use}: {reason}")
        entries.append(entry)
    return {
        "kernel": kind.kernel, "when": kind.when, "present": asdict(present), "candidates": entries,
        "chosen": asdict(present),
    }  # fmt: skip


def tune(
    kind: Class, architecture: str, device: torch.device, fatal: Sequence[dict[str, Any]] = (), repeats: int = REPEATS
) -> dict[str, Any]:
    """All candidates of the class on the GPU: checked, timed in turn at every shape, and judged.

    Shapes that do not fit the card's memory are left out, and said so. Today's configuration stays unless another is
    faster, spill as it may; if it is wrong or does not run, there is nothing to be faster than, and the fastest wins.

    Raises:
        Fatal: a candidate cost this process the GPU.
        Discarded: no shape fits the card, or no configuration runs and is right.
    """
    present = kind.present(architecture)
    uses = candidates(kind.kernel, present, refused(kind.name, architecture))
    entries: list[dict[str, Any]] = [{"use": asdict(use), "discarded": None, "seconds": {}} for use in uses]
    for entry in fatal:
        for own in entries:
            if entry["class"] == kind.name and entry["use"] == own["use"]:
                own["discarded"] = f"cost the process its GPU: {entry['reason']}"
    shapes: dict[str, str | None] = {}
    for work in kind.works:
        try:
            _time(work, uses, entries, device, repeats)
            shapes[work.id] = None
        except torch.OutOfMemoryError as error:
            shapes[work.id] = f"does not fit: {str(error).splitlines()[0]}"
            for entry in entries:
                entry["seconds"].pop(work.id, None)
        torch.cuda.empty_cache()
    if all(shapes.values()):
        raise Discarded("no shape fits this card")
    timings = [None if entry["discarded"] else entry["seconds"] for entry in entries]
    first, *others = timings
    if first is None:
        best = judge.fastest(timings)
        if best is None:
            raise Discarded(f"{entries[0]['discarded']}, and nor is any candidate right")
    else:
        best = judge.winner(first, [None, *others])
        for entry, timing in zip(entries, timings, strict=True):
            if timing is not None:
                entry["verdict"] = judge.verdict(first, timing)._asdict()
    return {
        "kernel": kind.kernel, "when": kind.when, "present": asdict(present), "shapes": shapes,
        "candidates": entries, "chosen": asdict(uses[best or 0]), "changed": best is not None,
    }  # fmt: skip


def _time(
    work: Work, uses: list[Configuration], entries: list[dict[str, Any]], device: torch.device, repeats: int
) -> None:
    """Check and time what is not discarded yet at one shape; adds samples to the entries."""
    with _attempt(uses[0]):
        prepared = [work.prepare(device)]
        sets = stopwatch.input_sets(prepared[0].bytes_moved, device)
        prepared += [work.prepare(device, seed) for seed in range(1, sets)]
    _discard(work, uses, entries, prepared[0], device)
    living = [(use, entry) for use, entry in zip(uses, entries, strict=True) if entry["discarded"] is None]
    if not living:
        return
    runs = [one.run for one in prepared]
    with trying(work.kernel, living[0][0]):
        calls = stopwatch.calls_for(runs)
    # In turn, so that a clock that drifts meets all alike; the first round warms up.
    for repeat in range(repeats + 1):
        for use, entry in living:
            with trying(work.kernel, use):
                taken = stopwatch.seconds(runs, calls)
            if repeat:
                entry["seconds"].setdefault(work.id, []).append(taken)


def _discard(
    work: Work, uses: list[Configuration], entries: list[dict[str, Any]], prepared: Prepared, device: torch.device
) -> None:
    """Note in the entries which are wrong or do not run, and what the others launched."""
    believed: Tensors | None = None
    for use, entry in zip(uses, entries, strict=True):
        if entry["discarded"] is not None:
            continue
        # If today's spills, so does its code on other grids; it is measured all the same.
        spilling = code_of(use) == code_of(uses[0])
        try:
            expected = believed or _believed(work, use, prepared, device, spilling=spilling)
            entry.setdefault("launches", {})[work.id] = check(work, use, prepared, expected, spilling=spilling)
        except Discarded as reason:
            entry["discarded"] = str(reason)
        else:
            believed = expected


def _believed(work: Work, use: Configuration, prepared: Prepared, device: torch.device, *, spilling: bool) -> Tensors:
    """What `use` computes from these inputs, after it has agreed with plain torch at a tiny size; raises as `check`."""
    tiny = work.tiny()
    inputs = tiny.prepare(device)
    check(tiny, use, inputs, inputs.expected(), spilling=spilling)
    with _attempt(use), trying(work.kernel, use):
        return tuple(value.clone() for value in prepared.comparable(prepared.run()))

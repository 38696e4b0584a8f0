"""What is tried in place of a configuration: a few changes of its shape, and the grids worth trying for each.

Changes of shape are compiled anew; how many programs run is not. A shape that spills registers, or needs more shared
memory than a block of the smaller card has, is none: `bench/results/tuning-candidates.json` says which do, found by
`python -m tests.kernels.candidates` without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.tune.catalogue import works
from bench.tune.work import Work
from decovae_kernels.configurations import (
    DEFAULT,
    KERNELS,
    Configuration,
    Merging,
    Passing,
    Products,
    Single,
    Slab,
    Streaming,
    Voxels,
    checked,
    rule,
)

COMPILED = Path(__file__).parents[1] / "results" / "tuning-candidates.json"
SHARED_BYTES = 99 << 10
"""What a block may have of shared memory on an RTX 3090, the smaller card."""

_SHAPES: dict[type[Configuration], tuple[dict[str, float], ...]] = {
    # Factors; 1 wherever none is given.
    Streaming: (
        # Narrower than 16 bytes a thread, loads would be too, so the width is left alone.
        {}, {"warps": 2}, {"warps": 0.5}, {"vectors": 2}, {"vectors": 0.5}, {"warps": 2, "vectors": 0.5},
    ),
    Products: ({}, {"warps": 0.5}, {"samples": 2}, {"samples": 0.5}),
    Passing: (
        {}, {"elements": 2}, {"elements": 0.5}, {"warps": 2}, {"warps": 2, "elements": 2},
        {"warps": 0.5, "elements": 0.5}, {"channels": 0.5}, {"channels": 2},
    ),
    Merging: ({}, {"warps": 0.5}, {"warps": 0.25}, {"warps": 2}, {"numbers": 2}, {"numbers": 0.5}),
    Single: ({}, {"warps": 0.5}, {"warps": 2}),
    Voxels: (
        {}, {"warps": 0.5}, {"warps": 2}, {"channel_bytes": 2}, {"channel_bytes": 0.5},
        {"warps": 0.5, "channel_bytes": 2}, {"vectors": 2},
    ),
    Slab: ({}, {"bytes": 0.25}, {"bytes": 0.5}, {"bytes": 2}, {"bytes": 4}),
}  # fmt: skip
_GRIDS: dict[type[Configuration], tuple[dict[str, float], ...]] = {
    Streaming: ({}, {"programs": 0.5}, {"programs": 1.5}, {"programs": 2}, {"programs": 4}),
    Products: ({}, {"programs": 2}, {"programs": 4}),
    Passing: ({}, {"programs": 0.5}, {"programs": 2}, {"programs": 4}, {"tiles": 2}, {"tiles": 0.5}),
}


def shapes(kernel: str, use: Configuration) -> list[Configuration]:
    """`use`, and its neighbours that compile to other code; those that make no sense are left out."""
    return list({code_of(shape): shape for shape in _changed(use, _SHAPES[KERNELS[kernel].form])}.values())


def grids(use: Configuration) -> list[Configuration]:
    """`use`, and the same code on other grids."""
    return list(_changed(use, _GRIDS.get(type(use), ({},))))


def candidates(kernel: str, use: Configuration, refused: Iterable[Configuration] = ()) -> list[Configuration]:
    """`use` first, then everything that is tried in its place, without the shapes that are `refused`."""
    spilling = {code_of(shape) for shape in refused} - {code_of(use)}
    return [
        candidate
        for shape in shapes(kernel, use)
        if code_of(shape) not in spilling
        for candidate in grids(shape)
    ]  # fmt: skip


def code_of(use: Configuration) -> Configuration:
    """The configuration without what only its grid depends on: equal ones compile to the same code."""
    fixed = {name: 1 for name in ("programs", "tiles") if hasattr(use, name)}
    return _replaced(use, fixed)


def _replaced(use: Configuration, values: dict[str, int]) -> Configuration:
    return type(use)(**{**dataclasses.asdict(use), **values})


def _changed(use: Configuration, changes: Iterable[dict[str, float]]) -> Iterator[Configuration]:
    seen = set()
    for factors in changes:
        values = {name: getattr(use, name) * factor for name, factor in factors.items()}
        if any(value != int(value) for value in values.values()):
            continue
        changed = _replaced(use, {name: int(value) for name, value in values.items()})
        try:
            checked(changed, "candidate")
        except ValueError:
            continue
        if changed not in seen:
            seen.add(changed)
            yield changed


@dataclasses.dataclass(frozen=True)
class Class:
    """Works that share one choice: those of a kernel, a layout, a size of element and a range of channels."""

    kernel: str
    channels: tuple[int, int] | None
    layout: str
    element: int | None
    works: tuple[Work, ...]

    @property
    def name(self) -> str:
        channels = () if self.channels is None else (f"C{self.channels[0]}-{self.channels[1]}",)
        return "/".join([self.kernel, *channels, self.layout, *(() if self.element is None else (f"{self.element}B",))])

    @property
    def when(self) -> dict[str, Any]:
        """The conditions as a rule of the data states them."""
        when = {"channels": self.channels and list(self.channels), "layout": self.layout, "element": self.element}
        return {name: value for name, value in when.items() if value is not None}

    def present(self, architecture: str) -> Configuration:
        """What the data has for it today."""
        return rule(self.kernel, architecture, *self.works[0].condition).use


def classes() -> list[Class]:
    """All classes in the order of their weight, split where the default's rules are."""
    found: dict[Class, list[Work]] = {}
    for work in works():
        channels = rule(work.kernel, DEFAULT, *work.condition).channels
        # Packed moments are float64 whatever they were taken of.
        element = work.dtype.itemsize if work.dtype.itemsize in (2, 4) else None
        found.setdefault(Class(work.kernel, channels, work.reads, element, ()), []).append(work)
    return [dataclasses.replace(key, works=tuple(some)) for key, some in found.items()]


@functools.cache
def compiled() -> list[dict[str, Any]]:
    """The record of all shapes compiled without a GPU; empty where it is not at hand."""
    if not COMPILED.exists():
        return []
    found: list[dict[str, Any]] = json.loads(COMPILED.read_text(encoding="utf-8"))["kernels"]
    return found


def refused(name: str, architecture: str) -> list[Configuration]:
    """Shapes for that class that spill or need too much shared memory as compiled for that architecture."""
    return [
        KERNELS[entry["kernel"]].form(**entry["use"])
        for entry in compiled()
        if entry["class"] == name and entry["architecture"] == architecture and entry["refused"] is not None
    ]

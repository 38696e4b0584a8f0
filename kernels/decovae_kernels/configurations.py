"""How every kernel is launched: data, in `configurations.json`, looked up by architecture, channels, layout and dtype.

An architecture ("sm_86", "sm_90", or "default" for every other and for tensors that are on no GPU) lists rules for a
kernel; the first whose conditions hold is taken, the architecture's own before the default's. A rule states where its
figures come from. Nothing is timed when a program runs: the same version gives the same bits on the same card.
`python -m bench.tune` measures candidates on a card and writes what wins into the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch

FILE = Path(__file__).with_name("configurations.json")
DEFAULT = "default"
LAYOUTS = ("interleaved", "planes", "strided", "channels_last", "contiguous")
MEASURED = ("date", "gpu", "driver", "torch", "triton", "commit")
"""What the provenance of a measured figure names."""

# Registers and a grid allow no more of it; Triton's tiles are powers of two.
_MOST_WARPS = 16
_MOST_PROGRAMS = 64
_MOST_TILES = 64
_LEAST_SLAB = 1 << 20
_SMALLEST_PRODUCT = 16


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Tiles of samples with all their channels in registers, which programs take in turn.

    A thread takes up to `width` neighbouring samples, no more than 16 bytes hold, `vectors` times a tile. `programs`
    are those of a multiprocessor.
    """

    warps: int
    width: int
    vectors: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Products:
    """Tiles of `samples` with up to 64 channels, multiplied as matrices; `programs` a multiprocessor."""

    warps: int
    samples: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Passing:
    """Tiles of `elements`, up to `channels` wide, of which a program reads `tiles` at the least.

    `programs` a multiprocessor are aimed at, over all volumes and channels.
    """

    warps: int
    elements: int
    channels: int
    programs: int
    tiles: int


@dataclasses.dataclass(frozen=True)
class Merging:
    """One program a group, which merges `numbers` of every kind at a time."""

    warps: int
    numbers: int


@dataclasses.dataclass(frozen=True)
class Single:
    """One program for everything."""

    warps: int


@dataclasses.dataclass(frozen=True)
class Voxels:
    """A tile of low-resolution voxels by up to `channel_bytes` of channels; a thread takes 16 bytes `vectors` times."""

    warps: int
    channel_bytes: int
    vectors: int


@dataclasses.dataclass(frozen=True)
class Slab:
    """Bytes of the upsampling convolution's products that are alive at once."""

    bytes: int


Configuration: TypeAlias = Streaming | Products | Passing | Merging | Single | Voxels | Slab
C = TypeVar("C", Streaming, Products, Passing, Merging, Single, Voxels, Slab)


@dataclasses.dataclass(frozen=True)
class Kernel(Generic[C]):
    """A launch that the data describes."""

    name: str
    form: type[C]

    def on(self, device: torch.device, channels: int, layout: str, element: int) -> C:
        """Its configuration for tensors on `device`, of so many channels and bytes an element."""
        # Under dynamic shapes the number is a symbol, which has no hash.
        found: C = _lookup(self.name, architecture(device), int(channels), layout, element)
        return found


MOMENTS = Kernel("moments", Streaming)
MOMENTS_GRADIENT = Kernel("moments_gradient", Streaming)
MOMENTS_DOT = Kernel("moments_dot", Products)
MOMENTS_GRADIENT_DOT = Kernel("moments_gradient_dot", Products)
LOSS = Kernel("loss", Single)
HEAD = Kernel("head", Streaming)
HEAD_GRADIENT = Kernel("head_gradient", Streaming)
NORM_ADD = Kernel("norm_add", Passing)
NORM_STATE = Kernel("norm_state", Merging)
NORM_APPLY = Kernel("norm_apply", Passing)
NORM_SUMS = Kernel("norm_sums", Passing)
NORM_COEFFICIENTS = Kernel("norm_coefficients", Merging)
NORM_GRADIENT = Kernel("norm_gradient", Passing)
GATHER = Kernel("gather", Voxels)
SPREAD = Kernel("spread", Voxels)
UPSAMPLE = Kernel("upsample", Voxels)
DOWNSAMPLE = Kernel("downsample", Voxels)
SLAB = Kernel("slab", Slab)

KERNELS: Mapping[str, Kernel[Any]] = {
    kernel.name: kernel
    for kernel in (
        MOMENTS, MOMENTS_GRADIENT, MOMENTS_DOT, MOMENTS_GRADIENT_DOT, LOSS, HEAD, HEAD_GRADIENT,
        NORM_ADD, NORM_STATE, NORM_APPLY, NORM_SUMS, NORM_COEFFICIENTS, NORM_GRADIENT,
        GATHER, SPREAD, UPSAMPLE, DOWNSAMPLE, SLAB,
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rule:
    """A configuration and where it holds: `channels` from–to, one `layout`, `element` bytes; None is anything."""

    use: Configuration
    chosen: str | Mapping[str, str]
    channels: tuple[int, int] | None = None
    layout: str | None = None
    element: int | None = None

    def holds(self, channels: int, layout: str, element: int) -> bool:
        return (
            (self.channels is None or self.channels[0] <= channels <= self.channels[1])
            and self.layout in (None, layout)
            and self.element in (None, element)
        )

    @property
    def unconditional(self) -> bool:
        return self.channels is None and self.layout is None and self.element is None


Table: TypeAlias = Mapping[str, Mapping[str, tuple[Rule, ...]]]
"""Architecture → kernel → rules."""


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90" and the like of an NVIDIA GPU that is there, else "default"."""
    # AMD's devices are called cuda too, and count their capabilities differently.
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return DEFAULT
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def parse(data: Any, source: str) -> Table:
    """The table that `data`, read from `source`, describes.

    Raises:
        ValueError: a name is unknown, a value impossible, or the default leaves something open; says which.
    """
    table = {}
    for name, kernels in _entries(data, source):
        if name != DEFAULT and not re.fullmatch(r"sm_\d{2,3}", name):
            raise ValueError(f"{source}: {name!r} is no architecture: use 'default', or a name like 'sm_90'")
        table[name] = {
            kernel: _rules(kernel, rules, f"{source}: {name}, {kernel}")
            for kernel, rules in _entries(kernels, f"{source}: {name}")
        }
    complete = table.get(DEFAULT, {})
    for kernel in KERNELS:
        rules = complete.get(kernel)
        if not rules or not rules[-1].unconditional:
            raise ValueError(f"{source}: default, {kernel}: the last rule must be one without conditions")
    return table


def rule(kernel: str, architecture: str, channels: int, layout: str, element: int, table: Table | None = None) -> Rule:
    """The first rule that holds, the architecture's before the default's."""
    table = _TABLE if table is None else table
    rules = (*table.get(architecture, {}).get(kernel, ()), *table[DEFAULT][kernel])
    return next(found for found in rules if found.holds(channels, layout, element))


def load() -> Table:
    """The table as the file has it now."""
    try:
        data = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{FILE}: not a readable JSON file ({error}): reinstall decovae_kernels") from error
    return parse(data, str(FILE))


@contextlib.contextmanager
def trying(kernel: str, configuration: Configuration) -> Iterator[None]:
    """Launch `kernel` with this configuration, whatever the data say; for one thread, to measure it."""
    if not isinstance(configuration, KERNELS[kernel].form):
        raise TypeError(f"{kernel} takes {KERNELS[kernel].form.__name__}, got {configuration}")
    before = _TRIED.get(kernel)
    _TRIED[kernel] = configuration
    _lookup.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del _TRIED[kernel]
        else:
            _TRIED[kernel] = before
        _lookup.cache_clear()


@functools.cache
def _lookup(kernel: str, architecture: str, channels: int, layout: str, element: int) -> Any:
    return _TRIED.get(kernel) or rule(kernel, architecture, channels, layout, element).use


def checked(configuration: Configuration, where: str) -> Configuration:
    """`configuration` itself.

    Raises:
        ValueError: a value that cannot be launched; the message begins with `where`.
    """
    for name, value in dataclasses.asdict(configuration).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: {name}={value!r} must be a positive whole number")
        if name not in ("programs", "tiles", "bytes") and value & (value - 1):
            raise ValueError(f"{where}: {name}={value} must be a power of two")
        least, most = _LIMITS[name]
        if not least <= value <= most:
            raise ValueError(f"{where}: {name}={value} must lie between {least} and {most}")
    if isinstance(configuration, Passing) and configuration.elements < configuration.channels:
        raise ValueError(f"{where}: elements={configuration.elements} must not be fewer than the tile's channels")
    return configuration


_LIMITS = {
    "warps": (1, _MOST_WARPS),
    "width": (1, 8),
    "vectors": (1, 32),
    "programs": (1, _MOST_PROGRAMS),
    "samples": (_SMALLEST_PRODUCT, 256),
    "elements": (64, 1 << 15),
    "channels": (1, 256),
    "tiles": (1, _MOST_TILES),
    "numbers": (64, 1 << 14),
    "channel_bytes": (4, 256),
    "bytes": (_LEAST_SLAB, 1 << 32),
}


def check_provenance(chosen: Any, where: str) -> str | Mapping[str, str]:
    """`chosen` itself.

    Raises:
        ValueError: it is neither a sentence nor all that a measurement names; the message begins with `where`.
    """
    if isinstance(chosen, str) and chosen:
        return chosen
    if isinstance(chosen, dict) and set(chosen) == set(MEASURED) and all(isinstance(x, str) for x in chosen.values()):
        return chosen
    raise ValueError(f"{where}: chosen={chosen!r} must be a sentence, or an object with {', '.join(MEASURED)} as texts")


def _entries(data: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: must be an object, got {type(data).__name__}")
    return list(data.items())


def _rules(kernel: str, rules: Any, where: str) -> tuple[Rule, ...]:
    if kernel not in KERNELS:
        raise ValueError(f"{where}: no such kernel: use one of {', '.join(KERNELS)}")
    if not isinstance(rules, list):
        raise ValueError(f"{where}: must be a list of rules, got {type(rules).__name__}")
    return tuple(_rule(KERNELS[kernel].form, found, f"{where}, rule {i}") for i, found in enumerate(rules, start=1))


def _rule(form: type[Configuration], data: Any, where: str) -> Rule:
    values = dict(_entries(data, where))
    chosen = check_provenance(values.pop("chosen", None), where)
    when = dict(_entries(values.pop("when", {}), f"{where}, when"))
    if unknown := set(when) - {"channels", "layout", "element"}:
        raise ValueError(f"{where}: unknown condition {', '.join(sorted(unknown))}: use channels, layout, element")
    fields = [field.name for field in dataclasses.fields(form)]
    if set(values) != set(fields):
        raise ValueError(f"{where}: must state {', '.join(fields)}, got {', '.join(values) or 'nothing'}")
    return Rule(checked(form(**values), where), chosen, **_conditions(when, where))


def _conditions(when: dict[str, Any], where: str) -> dict[str, Any]:
    channels, layout, element = (when.get(name) for name in ("channels", "layout", "element"))
    if channels is not None:
        whole = isinstance(channels, list) and len(channels) == 2 and all(type(x) is int for x in channels)
        if not whole or not 1 <= channels[0] <= channels[1]:
            raise ValueError(f"{where}: channels={channels!r} must be [first, last]")
        channels = channels[0], channels[1]
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"{where}: layout={layout!r} is unknown: use one of {', '.join(LAYOUTS)}")
    if element is not None and element not in (2, 4):
        raise ValueError(f"{where}: element={element!r} must be 2 or 4 bytes")
    return {"channels": channels, "layout": layout, "element": element}


_TRIED: dict[str, Configuration] = {}
_TABLE = load()

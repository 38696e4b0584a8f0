"""Numbers with a unit and three digits, as tables and pictures show them."""

from __future__ import annotations

Units = tuple[tuple[str, float], ...]

DASH = "–"
"""Stands where there is no figure."""


def seconds(value: float) -> str:
    return _scaled(value, (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)))


def size(value: float) -> str:
    """Bytes; 1 GB is 10⁹."""
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def operations(value: float) -> str:
    return _scaled(value, (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1)))


def bandwidth(value: float) -> str:
    """Bytes a second."""
    return _scaled(value, (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)))


def rate(value: float) -> str:
    """Floating-point operations a second."""
    return _scaled(value, (("TFLOP/s", 1e12), ("GFLOP/s", 1e9), ("MFLOP/s", 1e6)))


def times(value: float) -> str:
    """A factor."""
    return f"{value:.2f}×" if value < 9.995 else f"{value:.1f}×" if value < 99.95 else f"{value:.0f}×"


def percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"


def shape(lengths: str) -> str:
    """A shape as a row states it, "2x4x8x8x8", as people write it, "2×4×8³"."""
    parts = lengths.split("x")
    if len(parts) >= 3 and len(set(parts[-3:])) == 1:
        parts = [*parts[:-3], f"{parts[-1]}³"]
    return "×".join(parts)


def _scaled(value: float, units: Units) -> str:
    unit, scale = next((pair for pair in units if value >= pair[1]), units[-1])
    scaled = value / scale
    digits = 0 if unit in ("B", "FLOP") or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {unit}"

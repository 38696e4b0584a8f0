"""Work side by side on a machine's cores: how much of it fits."""

from __future__ import annotations

import math
import os

MOST_AT_ONCE = 8
"""Volumes that a process works on side by side, at most."""

SHARE = 0.5
"""Of the machine's memory, that all its processes together may fill with volumes."""


def fitting(volume_bytes: int) -> int:
    """How many volumes of so many bytes each process of this machine has room for, 1 to 8.

    All of them together fill at most half of the memory that the machine has. That is not what is free at this moment:
    files that the system keeps in memory until somebody needs it would count as taken. A container's limit is not seen.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = SHARE * memory_bytes() / processes / volume_bytes
    return max(1, int(min(room, MOST_AT_ONCE)))


def memory_bytes() -> float:
    """The machine's memory; infinite where the system does not tell."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

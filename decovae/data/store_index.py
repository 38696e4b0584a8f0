"""The index of a volume store: one line of JSON a volume, parsed when it is asked for."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from decovae.data.volumes import VolumeRecord, affine_rows
from decovae.errors import InputError

BLOCK = 1 << 20
FIELDS = frozenset(
    "subject session source source_sha256 file sha256 dtype low high range shape affine foreground columns".split()
)
"""What a line of the index has, at least."""


def canonical(value: Any) -> str:
    """JSON whose bytes depend on the value alone: keys sorted, no blanks, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Index(Sequence[VolumeRecord]):
    """The records of a store, in order, read from a memory-mapped file.

    What a process holds of its own is eight bytes a volume, and those a forked one shares with its parent: the lines
    are the page cache's, and a record lives as long as its user keeps it.

    Attributes:
        digest: SHA-256 of the file, in hexadecimal digits.
    """

    def __init__(self, path: Path) -> None:
        """Map the file and find its lines.

        Raises:
            OSError: it cannot be read.
            ValueError: it is empty, or its last line is cut off.
        """
        self.path = path
        with path.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._lines[-1:] != b"\n":
            raise ValueError("its last line is cut off")
        digest = hashlib.sha256()
        ends = []
        for start in range(0, len(self._lines), BLOCK):
            block = self._lines[start : start + BLOCK]
            digest.update(block)
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + start)
        self.digest = digest.hexdigest()
        self._offsets = np.concatenate([np.array([0]), *(each + 1 for each in ends)])
        self._last: tuple[int, Mapping[str, Any]] = -1, {}  # who reads a volume asks for its record too

    def __reduce__(self) -> tuple[type[Index], tuple[Path]]:
        return Index, (self.path,)  # another process maps the file itself

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> VolumeRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[VolumeRecord]: ...
    def __getitem__(self, index: int | slice) -> VolumeRecord | Sequence[VolumeRecord]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        entry = self.entry(index)
        try:
            return record_of(entry)
        except (AttributeError, TypeError, ValueError) as error:
            raise self._damage(range(len(self))[index]) from error

    def entry(self, index: int) -> Mapping[str, Any]:
        """A volume's line as it stands in the index.

        Raises:
            IndexError: there is no such volume.
            InputError: the line is no entry of a store.
        """
        place = range(len(self))[index]
        last, entry = self._last
        if last == place:
            return entry
        line = self._lines[int(self._offsets[place]) : int(self._offsets[place + 1])]
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._damage(place) from error
        if not isinstance(entry, dict) or not entry.keys() >= FIELDS:
            raise self._damage(place)
        self._last = place, entry
        return entry

    def _damage(self, index: int) -> InputError:
        return InputError(f"{self.path}, line {index + 1}: no entry of a volume store; prepare the volumes again.")


def record_of(entry: Mapping[str, Any]) -> VolumeRecord:
    """What an entry of the index says of its volume.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: `entry` is no such thing.
    """
    depth, height, width = (int(size) for size in entry["shape"])
    return VolumeRecord(
        subject=str(entry["subject"]),
        source=str(entry["source"]),
        shape=(depth, height, width),
        low=float(entry["low"]),
        high=float(entry["high"]),
        affine=affine_rows(entry["affine"]),
        columns={str(name): str(value) for name, value in entry["columns"].items()},
        session=str(entry["session"]),
        foreground=bytes.fromhex(entry["foreground"]),
        sha256=str(entry["sha256"]),
    )

"""How much a folder of the cache may grow to: features of a large cohort would fill a disk."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

MOST_BYTES = 20 * 10**9
"""That the folder may hold."""

SHARE = 0.1
"""Of the disk, as it would be without the folder, that the folder may fill."""

HEADER_BYTES = 512
"""Of a file, at most, besides its tensors."""


class CacheRoom:
    """Bytes that this process may still write into a folder of the cache.

    The folder is measured once, when the first file is to be written, and what is written later is counted; processes
    of one machine share the room there is. A folder that cannot be measured has none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: float | None = None

    def take(self, folder: Path, size: int) -> bool:
        """Whether so many bytes more fit into the folder; if so they count as written. From any thread."""
        with self._lock:
            if self._left is None:
                self._left = _room(folder) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            if size + HEADER_BYTES > self._left:
                return False
            self._left -= size + HEADER_BYTES
            return True


def _room(folder: Path) -> float:
    try:
        used = sum(_size(path) for path in folder.rglob("*"))
        there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        return min(MOST_BYTES, SHARE * (shutil.disk_usage(there).free + used)) - used
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except OSError:  # another process has just moved or removed it
        return 0

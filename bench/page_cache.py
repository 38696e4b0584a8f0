"""What of files lies in memory: put out of it, for reading as from a cold disk, and counted."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path

PAGE = mmap.PAGESIZE
TRIES = 100


def files_of(path: Path) -> list[Path]:
    """A file, or all files below a folder."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def bytes_on_disk(path: Path) -> int:
    """What a file, or all below a folder, takes in whole blocks of the disk."""
    return sum(file.stat().st_blocks * 512 for file in files_of(path))


def drop(path: Path) -> None:
    """Write out what the system keeps of a file, or of all below a folder, and let go of it (Linux).

    Raises:
        RuntimeError: some of it stays: a process has mapped it.
    """
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.fsync(descriptor)
            for _ in range(TRIES):  # pages that a processor is just putting on its lists stay for a moment
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                if not resident(file):
                    break
                time.sleep(0.01)
            else:
                raise RuntimeError(f"{file} stays in the page cache: reading it would not be cold")
        finally:
            os.close(descriptor)


def resident(path: Path) -> int:
    """Pages of a file, or of all below a folder, that lie in memory (Linux).

    Raises:
        OSError: the system does not say.
    """
    library = ctypes.CDLL(None, use_errno=True)
    count = 0
    for file in files_of(path):
        length = file.stat().st_size
        if length == 0:
            continue
        with file.open("r+b") as stream, mmap.mmap(stream.fileno(), length) as mapped:
            found = (ctypes.c_ubyte * -(-length // PAGE))()
            start = (ctypes.c_char * length).from_buffer(mapped)
            failed = library.mincore(ctypes.byref(start), ctypes.c_size_t(length), found)
            del start  # a mapping that something points into cannot be closed
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
            count += sum(page & 1 for page in found)
    return count

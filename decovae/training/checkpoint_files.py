"""A checkpoint as it lies on the disk: its manifest, its files with their checksums, and which of them stay."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from decovae.errors import RunError

MANIFEST = "manifest.json"
ENTRIES = "step-????????"
PARTIAL, REMOVED, REPLACED = ".partial", ".removed", ".replaced"
"""Ends of names that an entry has while it is written, while it is removed, and while another takes its place."""


class Damaged(Exception):
    """Why an entry is not whole."""


def entry_of(folder: Path, step: int) -> Path:
    """Where the entry of a step is, or would be."""
    return folder / f"step-{step:08d}"


def entries(folder: Path) -> list[Path]:
    """The published entries, oldest first."""
    return sorted(folder.glob(ENTRIES))


def read_manifest(entry: Path) -> dict[str, Any]:
    """What an entry says of itself: step, state, world, figure, networks, versions, files.

    Raises:
        Damaged: if it has no manifest, or none that can be read.
    """
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"its {MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not {"step", "state", "files"} <= manifest.keys():
        raise Damaged(f"its {MANIFEST} is not one")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(_is_noted(noted) for noted in files.values()):
        raise Damaged(f"its {MANIFEST} does not say how long its files are")
    return manifest


def _is_noted(noted: object) -> bool:
    return isinstance(noted, dict) and all(isinstance(noted.get(key), int) for key in ("bytes", "crc32"))


def check_files(entry: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Compare files of an entry with sizes and checksums of its manifest.

    Raises:
        Damaged: naming the first that differs.
    """
    for name, noted in files.items():
        crc = size = 0
        try:
            with (entry / name).open("rb") as file:
                while block := file.read(1 << 22):
                    crc, size = zlib.crc32(block, crc), size + len(block)
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from error
        if size != noted["bytes"]:
            raise Damaged(f"{name} has {size:,} bytes instead of {noted['bytes']:,}")
        if crc != noted["crc32"]:
            raise Damaged(f"{name} does not have the checksum it was written with")


def clean(folder: Path) -> None:
    """Remove what processes that were killed left half written or half removed."""
    for path in sorted(folder.glob(f"{ENTRIES}.*")):
        if path.suffix == REPLACED and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))  # killed between taking one away and putting the other there
        elif path.suffix in (PARTIAL, REMOVED, REPLACED):
            drop(path)


def make(partial: Path) -> None:
    """An empty folder to write an entry into.

    Raises:
        OSError: if it cannot be made.
    """
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def drop(folder: Path) -> None:
    """Remove an entry that nobody sees any more, as far as the file system lets it: a file that is open elsewhere can
    hold a folder, which then goes at the next start."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(partial: Path, entry: Path, manifest: Mapping[str, Any]) -> None:
    """Complete a folder of files with its manifest and give it its name: from then on it is seen, and whole.

    Raises:
        OSError: if it cannot be written.
        RunError: if files that other processes wrote are not there.
    """
    for name, noted in manifest["files"].items():
        path = partial / name
        if not path.exists() or path.stat().st_size != noted["bytes"]:
            raise RunError(
                f"{entry}: {name}, which another process wrote, is not there; put --out on a file system that all "
                "nodes of the run share."
            )
    with (partial / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    if entry.exists():
        replaced = entry.with_suffix(REPLACED)
        entry.rename(replaced)
        partial.rename(entry)
        drop(replaced)
    else:
        partial.rename(entry)
    _sync(entry.parent)


def retire(folder: Path, newest: Path, *, keep: int, keep_best: int, metric: str, higher: bool) -> None:
    """Remove what need not stay beside ``newest``, which was just published.

    The ``keep`` newest stay and the ``keep_best`` of the best figures; what is of later steps than ``newest`` goes: the
    run was taken up before it, and is now on another way.
    """
    found = entries(folder)
    past = [entry for entry in found if entry.name <= newest.name]
    figures = {entry: figure for entry in past if (figure := _figure(entry, metric)) is not None}
    best = sorted(figures, key=lambda entry: (figures[entry] if higher else -figures[entry], entry.name), reverse=True)
    stay = {*past[-max(keep, 1) :], *best[:keep_best]}
    for entry in found:
        if entry not in stay:
            removed = entry.with_suffix(REMOVED)
            drop(removed)
            entry.rename(removed)
            drop(removed)


def _figure(entry: Path, metric: str) -> float | None:
    try:
        noted = read_manifest(entry).get("figure")
    except Damaged:
        return None
    if not isinstance(noted, dict) or noted.get("metric") != metric:
        return None
    value = noted.get("value")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _sync(folder: Path) -> None:
    """Have a folder's names on the disk; not every file system can be asked for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def merged(files: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, Mapping[str, int]]:
    """The files of all processes in one, in order of their names."""
    everything = {name: noted for written in files for name, noted in written.items()}
    return dict(sorted(everything.items()))

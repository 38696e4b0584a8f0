"""A store, written: volumes one by one in any order, the index last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from decovae.data.store import FORMAT, INDEX, STORE, VERSION, file_axes, file_parts
from decovae.data.store_index import canonical
from decovae.data.volumes import Shape
from decovae.files import write_atomically, write_text
from decovae.preparation.volume import Prepared


def write_volume(folder: Path, prepared: Prepared) -> None:
    """Put a volume's file into a store, whole or not at all; its entry goes to `finish_store` later.

    Raises:
        OSError: the folder cannot be written.
    """
    header, voxels = file_parts(prepared.voxels)

    def write(file: Any) -> None:
        file.write(header)
        file.write(voxels.data)

    write_atomically(folder / prepared.entry["file"], write)


def finish_store(
    folder: Path, entries: Iterable[Mapping[str, Any]], settings: Mapping[str, Any], *, grid: Shape
) -> None:
    """Write the index of the volumes that are in place, then the description that makes the folder a store.

    Args:
        folder: where `write_volume` put the volumes.
        entries: those of `Prepared`, in any order; a split is the column `split` in their `columns`.
        settings: what the volumes were prepared with, in JSON's types.
        grid: the size of every volume.

    Raises:
        OSError: the folder cannot be written.
    """
    ordered = sorted(entries, key=lambda entry: (entry["subject"], entry["source"]))
    digest = hashlib.sha256()

    def write(file: Any) -> None:
        for entry in ordered:
            line = f"{canonical(entry)}\n".encode()
            digest.update(line)
            file.write(line)

    write_atomically(folder / INDEX, write)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "grid": list(grid),
        "axes": list(file_axes(grid)),
        "settings": settings,
        "volumes": len(ordered),
        "index_sha256": digest.hexdigest(),
    }
    write_text(folder / STORE, json.dumps(description, sort_keys=True, indent=2) + "\n")

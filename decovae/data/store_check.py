"""A store looked at file by file."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from decovae.data.inspection import for_all
from decovae.data.store import VOLUMES, StoreVolumes, open_store
from decovae.errors import InputError


def verify_store(path: Path, workers: int | None = None) -> list[str]:
    """One sentence for each volume of a store that is missing or damaged, and for each file that is not the store's.

    Args:
        path: the store's folder.
        workers: threads that read; by default one a CPU, at most 8.

    Raises:
        InputError: as `open_store`.
    """
    store = open_store(path)
    indices = range(len(store.records))
    results = for_all(partial(_verified, store), indices, description="Checking the store", workers=workers)
    ours, wrong = set(), []
    for result in results:
        if isinstance(result, InputError):  # a line of the index that names no file
            wrong.append(str(result))
        else:
            file, sentence = result
            ours.add(file)
            wrong += [sentence] if sentence else []
    there = sorted(file for file in (path / VOLUMES).rglob("*") if not file.is_dir())
    return wrong + [f"{file}: not a file of this store; remove it." for file in there if file not in ours]


def _verified(store: StoreVolumes, index: int) -> tuple[Path, str]:
    """A volume's file, and what is wrong with it; nothing where it is in order.

    Raises:
        InputError: what the index has there is no entry of a store.
    """
    record, entry, file = store.records[index], store.entry(index), store.file(index)
    try:
        store.read(index)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except InputError as error:
        return file, str(error)
    except OSError as error:
        return file, f"{file}: cannot be read ({error.strerror or error})."
    if digest != entry["sha256"]:
        return file, f"{file}: the volume of {record.source} has changed since it was written."
    return file, ""

"""The folder of a store: whose it may be before a preparation, and what is left in it after one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from decovae.data.store import INDEX, JOURNAL, STORE, VOLUMES
from decovae.errors import InputError
from decovae.files import remove_partial, writing
from decovae.preparation.journal import Entry

LOCK = ".lock"


def refuse_other_folders(out: Path) -> None:
    """Let through a folder that is new, empty, or a store's.

    Raises:
        InputError: anything else, which is not to be written into.
        RunError: it cannot be looked into.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder.")
    with writing(out):
        there = {path.name for path in out.iterdir()} if out.exists() else set()
    if JOURNAL not in there and any(name != LOCK and not name.endswith(".partial") for name in there):
        raise InputError(f"--out {out}: holds other things, {min(there)} among them; give a new or an empty folder.")


def withdraw(out: Path, files: Iterable[str], others: Iterable[str] = ()) -> set[str]:
    """Remove the volumes that rules leave out, and return their files: nobody trains on them from here on, whatever
    becomes of this preparation. If there are any, there is no store until it is finished anew.

    Args:
        files: of the volumes.
        others: names of files that show volumes, too.

    Raises:
        OSError: something cannot be removed.
    """
    gone = {file for file in files if (out / file).exists()}
    if gone:
        for name in (STORE, INDEX, *others, *sorted(gone)):
            (out / name).unlink(missing_ok=True)
    return gone


def sweep(out: Path, entries: Iterable[Entry]) -> set[str]:
    """Remove what is not of a finished store, half-written files among it, and return which volumes those were.

    Raises:
        OSError: something cannot be removed.
    """
    kept = {entry["file"] for entry in entries}
    gone = set()
    for path in [path for path in (out / VOLUMES).rglob("*") if not path.is_dir()]:
        if (name := path.relative_to(out).as_posix()) not in kept:
            path.unlink()
            if path.suffix == ".npy":
                gone.add(name)
    for folder in (out / VOLUMES).iterdir():
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
    remove_partial(out)
    return gone

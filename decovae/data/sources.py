"""Which files are the volumes, and whose they are: a folder's tree, or a CSV manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from decovae.data.file_bytes import printable
from decovae.data.manifest import MANIFESTS, RESERVED, read_table
from decovae.data.openable import is_there, unopenable
from decovae.data.walk import bare_name, walk
from decovae.errors import InputError

_SUBJECT = re.compile(r"(sub-[0-9A-Za-z]+)(?=[_.]|$)")
_SESSION = re.compile(r"(?:^|_)(ses-[0-9A-Za-z]+)(?=[_.]|$)")
_UK_BIOBANK = re.compile(r"([0-9]{7})_[0-9]{5}_([0-9]+)_[0-9]+")
"""Participant, field, instance (which visit), and number in an array: the names of its bulk files."""


class Source(NamedTuple):
    """A file, whose volume it holds, of which session if that is known, and what a manifest says of it."""

    subject: str
    path: Path
    columns: Mapping[str, str]
    session: str = ""


def find_volumes(root: Path, *, all_there: bool = True) -> list[Source]:
    """Every volume of `root`, sorted by subject and path, so that no order of a file system shows in a run.

    Args:
        root: a folder with `.nii` or `.nii.gz` files, or `.hdr`/`.img` pairs, anywhere below it, or a table (see
            `read_table`) with a column `path`, relative to the table's folder or absolute, and, if wanted, columns
            `subject` and `session`. All other columns but `mask` are kept as they are.
        all_there: refuse a manifest with paths to nothing; else those paths are returned like the others.

    Raises:
        InputError: nothing at `root`, no volumes, a folder that cannot be read, or a manifest without paths, or with
            paths to nothing.
    """
    try:
        if root.is_dir():
            found = _folder(root)
        elif root.is_file() and root.suffix.lower() in MANIFESTS:
            found = _manifest(root, all_there=all_there)
        elif is_there(root):
            raise InputError(
                f"{root} is neither a folder of volumes nor a CSV manifest (a .csv file with a column 'path')."
            )
        else:
            raise InputError(f"{root} does not exist: give a folder of volumes or a CSV manifest.")
    except OSError as error:
        raise InputError(f"{printable(root)} cannot be read ({error.strerror}).") from error
    return sorted(found, key=lambda source: (source.subject, source.path.as_posix()))


def subject_of(path: PurePath) -> str:
    """The subject that a path names: BIDS' `sub-XXX`, or UK Biobank's 1000011 as in 1000011_20252_2_0, at the beginning
    of a folder's or the file's name, else the file's bare name."""
    for pattern in (_SUBJECT, _UK_BIOBANK):
        for part in path.parts:
            if match := pattern.match(part):
                return match.group(1)
    return printable(bare_name(path.name))


def session_of(path: PurePath) -> str:
    """The session that a path names: BIDS' `ses-XXX`, or UK Biobank's instance, 2 in 1000011_20252_2_0, in a folder's
    or the file's name, else nothing."""
    found = [match[1] for part in path.parts if (match := _SESSION.search(part))]
    found += [match[2] for part in path.parts if (match := _UK_BIOBANK.match(part))]
    return found[0] if found else ""


def _folder(root: Path) -> list[Source]:
    entries = walk(root).entries
    for entry in entries:
        if entry.state == "closed":
            raise InputError(f"{printable(root / entry.path)} {entry.problem}.")
    volumes = [entry.path for entry in entries if entry.state in ("volume", "broken")]
    if not volumes:
        raise InputError(f"There is no .nii or .nii.gz file anywhere below {root}.")
    return [Source(subject_of(path), root / path, {}, session_of(path)) for path in volumes]


def _manifest(manifest: Path, *, all_there: bool) -> list[Source]:
    found: list[Source] = []
    missing = []
    for row in read_table(manifest, "path"):
        entry = row.value("path")
        if not entry:
            raise InputError(f"The manifest {manifest} has no path in line {row.line}.")
        path = manifest.parent / entry
        if all_there and (problem := unopenable(path)):
            missing.append((row.line, path, problem))
        subject = row.value("subject") or subject_of(PurePath(entry))
        session = row.value("session") or session_of(PurePath(entry))
        found.append(Source(subject, path, row.others(*RESERVED), session))
    if missing:
        line, path, problem = missing[0]
        more = f" ({len(missing) - 1} more of its files cannot be opened)" if len(missing) > 1 else ""
        raise InputError(f"The manifest {manifest} names {printable(path)} in line {line}, which {problem}{more}.")
    if not found:
        raise InputError(f"The manifest {manifest} lists no volumes.")
    return found

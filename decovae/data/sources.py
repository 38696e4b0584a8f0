"""Which files are the volumes, and whose they are: a folder's tree, or a CSV manifest."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from decovae.errors import InputError

SUFFIXES = (".nii", ".nii.gz")
BIDS_SUBJECT = re.compile(r"(sub-[0-9A-Za-z]+)(?=[_.]|$)")


class Source(NamedTuple):
    """A file, whose volume it holds, and what else a manifest says of it: column to value."""

    subject: str
    path: Path
    columns: Mapping[str, str]


def find_volumes(root: Path, *, all_there: bool = True) -> list[Source]:
    """Every volume of `root`, sorted by subject and path, so that no order of a file system shows in a run.

    Args:
        root: a folder with `.nii` or `.nii.gz` files anywhere below it, or a CSV file with a column `path`, relative
            to the CSV's folder or absolute, and, if wanted, a column `subject`. All other columns are kept as they
            are, without the blanks around names and values.
        all_there: refuse a manifest with paths to nothing; else those paths are returned like the others.

    Raises:
        InputError: nothing at `root`, no volumes, or a manifest without paths, or with paths to nothing.
    """
    if root.is_dir():
        found = [Source(subject_of(path.relative_to(root)), path, {}) for path in _walk(root)]
        if not found:
            raise InputError(f"There is no .nii or .nii.gz file anywhere below {root}.")
    elif root.is_file() and root.suffix.lower() == ".csv":
        found = _manifest(root, all_there=all_there)
    elif root.exists():
        raise InputError(
            f"{root} is neither a folder of volumes nor a CSV manifest (a .csv file with a column 'path')."
        )
    else:
        raise InputError(f"{root} does not exist: give a folder of volumes or a CSV manifest.")
    return sorted(found, key=lambda source: (source.subject, source.path.as_posix()))


def subject_of(path: PurePath) -> str:
    """The subject that a path names: BIDS' `sub-XXX` in a folder's or the file's name, else the file's bare name."""
    for part in path.parts:
        if match := BIDS_SUBJECT.match(part):
            return match.group(1)
    name = path.name
    for suffix in SUFFIXES[::-1]:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _walk(root: Path) -> Iterator[Path]:
    seen = set()  # links are followed, each folder once: a link to a parent would never end
    for folder, children, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        children.sort()  # which of two ways into a folder comes first must not depend on the file system
        # A hidden .nii is an editor's or another system's side file, not a scan.
        yield from (Path(folder, file) for file in files if _is_volume(file))


def _is_volume(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _manifest(manifest: Path, *, all_there: bool) -> list[Source]:
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The manifest {manifest} cannot be read as CSV: {error}.") from error
    if "path" not in columns:
        raise InputError(f"The manifest {manifest} has no column 'path'; it has {', '.join(columns) or 'none'}.")
    others = [name for name in columns if name and name not in ("path", "subject")]
    found, missing = [], []
    for line, row in rows:
        entry = (row["path"] or "").strip()
        if not entry:
            raise InputError(f"The manifest {manifest} has no path in line {line}.")
        path = manifest.parent / entry
        if all_there and not path.is_file():
            missing.append((line, path))
        subject = (row.get("subject") or "").strip() or subject_of(PurePath(entry))
        found.append(Source(subject, path, {name: (row[name] or "").strip() for name in others}))
    if missing:
        line, path = missing[0]
        more = f" ({len(missing) - 1} more of its files are missing)" if len(missing) > 1 else ""
        raise InputError(f"The manifest {manifest} names {path} in line {line}, which does not exist{more}.")
    if not found:
        raise InputError(f"The manifest {manifest} lists no volumes.")
    return found

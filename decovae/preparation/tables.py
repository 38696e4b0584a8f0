"""What a table knows of the subjects: its columns, joined to the volumes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from decovae.data.splits import key_of
from decovae.data.tabular import open_table
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.columns import KEYS, choices, columns_named


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """A table with a row a subject, beside what SRC says."""

    path: Path | None = None
    """CSV or TSV file with a row for each subject."""
    key: str = ""
    """Its column with the subjects' names, with or without BIDS' `sub-`; by default subject, eid or participant_id."""
    columns: tuple[str, ...] = ()
    """Columns to keep beside the volumes, by name or UK Biobank's field number; what only rules need is not kept."""


def join_table(
    candidates: Sequence[Candidate],
    path: Path,
    key: str = "",
    *,
    columns: Sequence[str] = (),
    needed: Sequence[str] = (),
) -> tuple[list[Candidate], list[Exclusion]]:
    """The candidates with what a table says of their subjects, and those of whom it says nothing, as exclusions.

    The table is read row by row, and no more is kept of it than the columns and subjects that are asked for.

    Args:
        candidates: volumes; several may be of one subject.
        path: a table as `decovae.data.tabular` reads it.
        key: its column with the subjects; by default the first of `columns.KEYS` that it has.
        columns: names or field numbers of columns that it must have.
        needed: names or field numbers of columns to take if it has them.

    Raises:
        InputError: no table, without one of the columns, with two rows of a subject, with none of any subject, or
            in contradiction to what is known of one.
    """
    if not candidates:
        return [], []
    rows = _rows_of({key_of(candidate.subject) for candidate in candidates}, path, key, columns, needed)
    joined, excluded = [], []
    for candidate in candidates:
        row = rows.get(key_of(candidate.subject))
        if row is None:
            reason = f"The table {path.name} has no row of its subject: add one."
            excluded.append(Exclusion.of(candidate, "problem", reason))
            continue
        for name, value in row.items():
            before = candidate.columns.get(name, value)
            if before != value:
                raise InputError(
                    f"Subject {candidate.subject}: the column {name!r} is {value!r} in {path} and {before!r} beside "
                    "the volumes; rename one of the two columns, or correct it."
                )
        joined.append(replace(candidate, columns={**candidate.columns, **row}))
    return joined, excluded


def _rows_of(
    subjects: Collection[str], path: Path, key: str, columns: Sequence[str], needed: Sequence[str]
) -> dict[str, dict[str, str]]:
    with open_table(path) as (names, rows):
        place = _key_place(names, path, key)
        taken = _places(names, path, columns, needed)
        found: dict[str, dict[str, str]] = {}
        lines: dict[str, int] = {}
        example = ""
        for line, cells in rows:
            if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
                raise InputError(
                    f"The table {path} has {len(cells)} cells in line {line} and {len(names)} names of columns; "
                    "correct the line."
                )
            subject = key_of(cells[place])
            example = example or subject
            if subject not in subjects:
                continue
            if subject in found:
                raise InputError(
                    f"The table {path} has two rows of subject {cells[place]!r}, in lines {lines[subject]} and {line}; "
                    "leave one."
                )
            found[subject] = {name: cells[column].strip() for name, column in taken.items()}
            lines[subject] = line
    if not found:
        raise InputError(
            f"The table {path} has a row of none of the volumes' subjects: in its column {names[place]!r} they are "
            f"written such as {example!r}, of the volumes such as {min(subjects)!r}; name the right column with "
            "--table.key, or say with --select.subject which part of a path is the subject."
        )
    return found


def _key_place(names: Sequence[str], path: Path, key: str) -> int:
    lower = [name.lower() for name in names]
    found = [names.index(key)] if key in names else [] if key else [lower.index(name) for name in KEYS if name in lower]
    if not found:
        wanted = repr(key) if key else f"{', '.join(KEYS[:3])}"
        raise InputError(
            f"The table {path} has no column {wanted} to find subjects by; name one with --table.key: there are "
            f"{choices(names, near=key or KEYS[0])}."
        )
    return found[0]


def _places(names: Sequence[str], path: Path, columns: Sequence[str], needed: Sequence[str]) -> Mapping[str, int]:
    places: dict[str, int] = {}
    for wanted in (*columns, *needed):
        found = columns_named(wanted, names)
        if not found and wanted in columns:
            raise InputError(f"The table {path} has no column {wanted!r}; there are {choices(names, near=wanted)}.")
        for name in found:
            if names.count(name) > 1:
                raise InputError(f"The table {path} has two columns {name!r}; rename one.")
            places[name] = names.index(name)
    return places

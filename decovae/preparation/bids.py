"""Images of one suffix in a BIDS dataset, with what its tables say of them.

Without pybids: it indexes a whole dataset into a database, at minutes for tens of thousands of subjects, and brings
pandas and sqlalchemy along; which files are T1-weighted images is written in their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from decovae.data.manifest import Row, read_table
from decovae.data.walk import Entry, unopenable, walk
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.selection import Selection, Survey, counted, source_of

_NAME = re.compile(
    r"(?P<subject>sub-[0-9A-Za-z]+)(_(?P<session>ses-[0-9A-Za-z]+))?(_[0-9A-Za-z]+-[^_.]+)*_(?P<suffix>[0-9A-Za-z]+)\..+",
    re.DOTALL,
)
_NAMED = 5  # subjects in a note
_MISPLACED = "does not lie where BIDS has it: in its subject's, its session's, and then a folder such as anat"

Columns = dict[str, str]


def survey_bids(root: Path, suffix: str, selection: Selection) -> Survey:
    """The files `sub-*/[ses-*/]<datatype>/sub-*_[ses-*_]…_<suffix>.nii[.gz]` of the dataset in `root`.

    `derivatives` and `sourcedata` are not searched. Columns are those of `participants.tsv` and of the subject's
    `sub-*_sessions.tsv`, which wins; BIDS' `n/a` becomes empty.

    Raises:
        InputError: the suffix is none, there are no subjects, or `participants.tsv` cannot be read.
        OSError: the folder cannot be read.
    """
    if not re.fullmatch("[0-9A-Za-z]+", suffix):
        raise InputError(f"A BIDS suffix is letters and digits such as T1w, not {suffix!r}.")
    people = _rows(root / "participants.tsv", "participant_id")
    taken: list[Candidate | Exclusion] = []
    others: Counter[str] = Counter()
    without, unknown = [], []
    subjects = []
    for path in sorted(root.glob("sub-*")):
        if path.is_dir():
            subjects.append(path.name)
        elif path.is_symlink() or _suffix(path.name) == suffix:
            taken.append(selection.take(root, Entry(PurePath(path.name), "broken", unopenable(path) or _MISPLACED)))
    if not subjects and not taken:
        raise InputError(f"{root} has BIDS' dataset_description.json, but no folder sub-…: give the dataset itself.")
    for subject in subjects:
        entries = [entry._replace(path=subject / entry.path) for entry in walk(root / subject).entries]
        ours = [entry for entry in entries if entry.state == "closed" or _suffix(entry.path.name) == suffix]
        others.update(_suffix(entry.path.name) for entry in entries if entry not in ours)
        if not ours:
            without.append(subject)
        elif people and subject not in people:
            unknown.append(subject)
        wanted = [selection.take(root, _placed(entry)) for entry in ours if selection.wants(entry)]
        taken += _with_columns(wanted, people.get(subject, []), root / subject / f"{subject}_sessions.tsv")
    missing = sorted(set(people) - set(subjects))
    return selection.survey(taken, _notes(suffix, others, without, unknown, missing))


def _suffix(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match["suffix"] if match else ""


def _placed(entry: Entry) -> Entry:
    """The entry, or what is wrong with where it lies."""
    name = _NAME.fullmatch(entry.path.name)
    folders = [part for part in (name["subject"], name["session"]) if part] if name else []
    if entry.state == "volume" and folders != list(entry.path.parent.parts[:-1]):
        return entry._replace(state="broken", problem=_MISPLACED)
    return entry


def _rows(table: Path, column: str) -> dict[str, list[Row]]:
    """Rows by their entry in `column`; none if there is no such file."""
    rows: dict[str, list[Row]] = {}
    if table.exists():
        for row in read_table(table, column):
            rows.setdefault(row.cells[column], []).append(row)
    return rows


def _with_columns(
    taken: list[Candidate | Exclusion], people: list[Row], sessions_table: Path
) -> Iterator[Candidate | Exclusion]:
    try:
        sessions = _rows(sessions_table, "session_id") if any(isinstance(item, Candidate) for item in taken) else {}
    except InputError as error:
        reason = f"Its sessions are not known: {str(error).replace(str(sessions_table), sessions_table.name)}"
        yield from (Exclusion.of(item, "problem", reason) if isinstance(item, Candidate) else item for item in taken)
        return
    for item in taken:
        if isinstance(item, Exclusion):
            yield item
            continue
        # Some datasets give each session a row of its own in participants.tsv.
        own = [row for row in people if row.cells.get("session_id", "") in ("", item.session)]
        both = {"participants.tsv": own, sessions_table.name: sessions.get(item.session, [])}
        yield _joined(item, both)


def _joined(item: Candidate, tables: Mapping[str, list[Row]]) -> Candidate | Exclusion:
    columns: Columns = {}
    for name, rows in tables.items():
        contents = [row.others("participant_id", "session_id") for row in rows]
        if any(content != contents[0] for content in contents):
            lines = " and ".join(str(row.line) for row in rows[:2])
            return Exclusion.of(item, "problem", f"{name} contradicts itself about it in lines {lines}.")
        known = {column: "" if value == "n/a" else value for column, value in (contents[0] if contents else {}).items()}
        columns |= {column: value for column, value in known.items() if value or column not in columns}
    return Candidate(item.subject, item.session, item.path, item.source, columns)


def _notes(
    suffix: str, others: Counter[str], without: list[str], unknown: list[str], missing: list[str]
) -> Iterator[str]:
    if others:
        listed = ", ".join(f"{count:,} {name or 'not named as BIDS has it'}" for name, count in sorted(others.items()))
        yield f"{counted(sum(others.values()), 'other image')} not taken: {listed}."
    for subjects, what in (
        (without, f"without a file whose suffix is {suffix}"),
        (unknown, "not in participants.tsv"),
        (missing, "in participants.tsv but without a folder"),
    ):
        if subjects:
            some = ", ".join(source_of(PurePath(subject)) for subject in subjects[:_NAMED])
            more = f" and {len(subjects) - _NAMED:,} more" if len(subjects) > _NAMED else ""
            yield f"{counted(len(subjects), 'subject')} {what}: {some}{more}."

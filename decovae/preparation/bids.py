"""Images of one suffix in a BIDS dataset, with what its tables say of them.

Without pybids: it indexes a whole dataset into a database, at minutes for tens of thousands of subjects, and brings
pandas and sqlalchemy along; which files are T1-weighted images is written in their names.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from decovae.data.manifest import Row, read_table
from decovae.data.openable import is_there, unopenable
from decovae.data.walk import Entry, bare_name, walk
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion
from decovae.preparation.selection import Selection, Survey, counted, passed_by, source_of

_NAME = re.compile(
    r"(?P<subject>sub-[0-9A-Za-z]+)(_(?P<session>ses-[0-9A-Za-z]+))?(_[0-9A-Za-z]+-[^_.]+)*_(?P<suffix>[0-9A-Za-z]+)\..+",
    re.DOTALL,
)
_NAMED = 5  # subjects in a note
_NOT_SEARCHED = ("code", "derivatives", "phenotype", "sourcedata", "stimuli")
_MISPLACED = "does not lie where BIDS has it: in its subject's, its session's, and then a folder such as anat"
_MISNAMED = "is not named as BIDS has it: sub-XXX_…_{}.nii, with its session, if any, after the subject"

Columns = dict[str, str]


def survey_bids(root: Path, suffix: str, selection: Selection) -> Survey:
    """The files `sub-*/[ses-*/]<datatype>/sub-*_[ses-*_]…_<suffix>.nii[.gz]` of the dataset in `root`.

    `derivatives`, `sourcedata` and what else BIDS has beside subjects are not searched. Columns are those of
    `participants.tsv` and of the subject's `sub-*_sessions.tsv`, which wins; BIDS' `n/a` becomes empty. Volumes that
    have the suffix, or no name that BIDS knows, and lie elsewhere are exclusions.

    Raises:
        InputError: the suffix is none, there are no subjects, or `participants.tsv` cannot be read.
        OSError: the folder cannot be read.
    """
    if not re.fullmatch("[0-9A-Za-z]+", suffix):
        raise InputError(f"A BIDS suffix is letters and digits such as T1w, not {suffix!r}.")
    people = _rows(root / "participants.tsv", "participant_id")
    named = sorted(name for name in os.listdir(root) if name.startswith("sub-"))
    if not named:
        raise InputError(f"{root} has BIDS' dataset_description.json, but no folder sub-…: give the dataset itself.")
    subjects = [name for name in named if os.path.isdir(root / name)]
    found = walk(root, passed_by=_NOT_SEARCHED)
    gone = {path for path in found.astray if path.name.startswith("sub-") and len(path.parts) == 1}
    entries = [*found.entries, *(Entry(path, "broken", unopenable(root / path)) for path in sorted(gone))]
    known = set(subjects)
    of_folder: dict[str, list[Entry]] = defaultdict(list)
    others: Counter[str] = Counter()
    for entry in entries:
        folder = next((part for part in entry.path.parts[:1] if part in known), "")
        if _is_asked_for(entry, suffix, in_subject=bool(folder)):
            of_folder[folder].append(_placed(entry, suffix))
        else:
            others[_suffix(entry.path.name)] += 1
    taken: list[Candidate | Exclusion] = []
    for folder in ("", *subjects):
        wanted = [selection.take(root, entry) for entry in of_folder[folder] if selection.wants(entry)]
        taken += _with_columns(wanted, people.get(folder, []), root / folder / f"{folder}_sessions.tsv")
    without = [subject for subject in subjects if not of_folder[subject]]
    unknown = [subject for subject in subjects if of_folder[subject] and people and subject not in people]
    missing = sorted(set(people) - set(subjects))
    rest = found._replace(astray=[path for path in found.astray if path not in gone])
    return selection.survey(taken, [*_notes(suffix, others, without, unknown, missing), *passed_by(rest)])


def _suffix(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match["suffix"] if match else ""


def _is_asked_for(entry: Entry, suffix: str, *, in_subject: bool) -> bool:
    """Whether an entry has the suffix, or may have it: what nobody named may be anything outside subjects' folders."""
    if entry.state in ("closed", "again") or _suffix(entry.path.name) == suffix:
        return True
    return not _suffix(entry.path.name) and (
        not in_subject or re.split("[^0-9A-Za-z]", bare_name(entry.path.name))[-1] == suffix
    )


def _placed(entry: Entry, suffix: str) -> Entry:
    """The entry, or what is wrong with its name or with where it lies."""
    if entry.state != "volume":
        return entry
    name = _NAME.fullmatch(entry.path.name)
    if name is None:
        return entry._replace(state="broken", problem=_MISNAMED.format(suffix))
    if [part for part in (name["subject"], name["session"]) if part] != list(entry.path.parent.parts[:-1]):
        return entry._replace(state="broken", problem=_MISPLACED)
    return entry


def _rows(table: Path, column: str) -> dict[str, list[Row]]:
    """Rows by their entry in `column`; none if there is no such file."""
    rows: dict[str, list[Row]] = {}
    if is_there(table):
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
        own = [row for row in people if row.value("session_id") in ("", item.session)]
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

"""Cohort rules: whom the user leaves out, by diagnosis, by any column's value, by a list."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from decovae.data.splits import key_of
from decovae.errors import InputError
from decovae.preparation.candidates import Candidate, Exclusion, Kind
from decovae.preparation.columns import KEYS, choices, columns_named
from decovae.preparation.conditions import NotComparable, parse_condition
from decovae.preparation.icd10 import parse_rule, read_codes


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Whom to leave out, by columns of SRC's manifest, of participants.tsv or of the table."""

    codes: tuple[str, ...] = ()
    """ICD-10 codes: whole ones, beginnings, ranges, for example G30 I6 C70-C72. A volume is left out if its subject has
    any of them."""
    codes_column: str = "41270"
    """Column with a subject's codes, by name or UK Biobank's field number; 41270 are the diagnoses of its hospitals."""
    where: tuple[str, ...] = ()
    """Values of columns, each in quotes, for example 'qc=fail' 'sex!=1' 'age<45'. A volume is left out if any is so."""
    subjects: Path | None = None
    """Text file with subjects to leave out, one a line, or CSV file with them in its first column or, if its first line
    has names of columns, in that named subject, eid or participant_id."""


_CELL = re.compile(r"""(\s*"[^"]*"\s*|\s*'[^']*'\s*|[^,;\t]*)(?:[,;\t]|$)""")
_WHOLE = re.compile(r"^([0-9]+)\.0+$")


class _Verdict(NamedTuple):
    rule: str
    kind: Kind
    reason: str


_Judge = Callable[[Candidate], Iterator[_Verdict]]


def needed_columns(rules: Rules) -> tuple[str, ...]:
    """The columns that rules look at, by name or field number.

    Raises:
        InputError: a rule is none.
    """
    codes = [rules.codes_column for text in rules.codes if parse_rule(text)]
    return tuple(dict.fromkeys([*codes, *(parse_condition(text).column for text in rules.where)]))


def apply_rules(candidates: Sequence[Candidate], rules: Rules) -> tuple[list[Candidate], list[Exclusion], list[str]]:
    """Who stays; who is left out, with the first rule that says so; and notes on how many each rule applies to.

    Where it is not known whether a rule applies, because a value is missing or cannot be read, the volume is left out
    as a problem, unless another rule applies anyway.

    Raises:
        InputError: a rule is none, no volume has its column, or the list of subjects cannot be read.
    """
    needed = needed_columns(rules)
    listed = frozenset() if rules.subjects is None else _read_subjects(rules.subjects)
    if candidates:
        _check_columns(candidates, needed)
    judges = [_by_list(listed, rules), _by_codes(rules), *(_by_condition(text) for text in rules.where)]
    kept, excluded = [], []
    applied: Counter[str] = Counter()
    for candidate in candidates:
        verdicts = list(chain.from_iterable(judge(candidate) for judge in judges))
        applied.update({verdict.rule for verdict in verdicts if verdict.kind == "rule"})
        if verdicts:
            first = min(verdicts, key=lambda verdict: verdict.kind != "rule")
            excluded.append(Exclusion.of(candidate, first.kind, first.reason))
        else:
            kept.append(candidate)
    given = dict.fromkeys(rules.codes + rules.where)
    notes = [f"Rule {text}: applies to {applied[text]} of {len(candidates)} volumes." for text in given]
    if rules.subjects is not None:
        here = len(listed & {_listed_key(candidate.subject) for candidate in candidates})
        notes.append(f"List {rules.subjects.name}: {here} of its {len(listed)} subjects are among the volumes'.")
    return kept, excluded, notes


@lru_cache(maxsize=1024)
def _find(name: str, columns: tuple[str, ...]) -> list[str]:
    return columns_named(name, columns)


def _cells(candidate: Candidate, name: str) -> dict[str, str]:
    """The candidate's columns that a name stands for, with their values."""
    return {column: candidate.columns[column] for column in _find(name, tuple(candidate.columns))}


def _check_columns(candidates: Sequence[Candidate], needed: Sequence[str]) -> None:
    for name in needed:
        if not any(_cells(candidate, name) for candidate in candidates):
            there = dict.fromkeys(chain.from_iterable(candidate.columns for candidate in candidates))
            raise InputError(
                f"No volume has a column {name!r}, which a rule looks at: there are {choices(there, near=name)}; "
                "correct the name, or give the table that has it with --table.path."
            )


def _by_list(listed: frozenset[str], rules: Rules) -> _Judge:
    def judge(candidate: Candidate) -> Iterator[_Verdict]:
        if rules.subjects is not None and _listed_key(candidate.subject) in listed:
            yield _Verdict("", "rule", f"Its subject is on the list {rules.subjects.name}.")

    return judge


def _by_codes(rules: Rules) -> _Judge:
    parsed = [(text, parse_rule(text)) for text in rules.codes]

    @cache  # there are many more diagnoses than codes
    def matching(code: str) -> list[str]:
        return [text for text, rule in parsed if rule.matches(code)]

    read = lru_cache(maxsize=4096)(read_codes)  # cells are much alike where each holds a single code, or none

    def judge(candidate: Candidate) -> Iterator[_Verdict]:
        cells = _cells(candidate, rules.codes_column) if parsed else {}
        if parsed and not cells:
            yield _Verdict("", "problem", _no_column(rules.codes_column, "rules on codes"))
        for column, cell in cells.items():
            codes, unreadable = read(cell)
            for code in codes:
                for text in matching(code):
                    yield _Verdict(text, "rule", f"Code {code} (rule {text}) in column {column}.")
            if unreadable:
                reason = f"Column {column} holds {unreadable[0][:40]!r}, which is no ICD-10 code: correct the table."
                yield _Verdict("", "problem", reason)

    return judge


def _by_condition(text: str) -> _Judge:
    condition = parse_condition(text)

    def judge(candidate: Candidate) -> Iterator[_Verdict]:
        cells = _cells(candidate, condition.column)
        if not cells:
            yield _Verdict(text, "problem", _no_column(condition.column, f"the rule {text}"))
            return
        try:
            value = condition.holding(list(cells.values()))
        except NotComparable as odd:
            reason = f"Column {condition.column} {odd}, so the rule {text} cannot be applied: correct the table."
            yield _Verdict(text, "problem", reason)
            return
        if value is not None:
            yield _Verdict(text, "rule", f"Column {condition.column} is {value or 'empty'} (rule {text}).")

    return judge


def _no_column(name: str, asking: str) -> str:
    return f"It has no column {name}, so {asking} cannot be applied: add the subject to the table."


def _read_subjects(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        why = "it is not text in UTF-8" if isinstance(error, UnicodeError) else error.strerror or error
        raise InputError(f"The list of subjects {path} cannot be read ({why}).") from error
    rows = [(number, [cell.strip() for cell in _CELL.findall(line)]) for number, line in enumerate(lines, 1)]
    names = [cell.strip("\"'").strip().lower() for cell in rows[0][1]] if rows else []
    place = next((names.index(key) for key in KEYS if key in names), None)
    if place is not None:
        rows = rows[1:]
    subjects = set()
    for number, cells in rows:
        cell = cells[place or 0] if len(cells) > (place or 0) else ""
        name = cell.strip("\"'").strip()
        if cell[:1] not in ("'", '"') and len(name.split()) > 1:
            raise InputError(
                f"The list of subjects {path} says {name[:40]!r} in line {number}: write a comma behind the subject, "
                "or, if blanks are part of its name, put it into quotes."
            )
        if name:
            subjects.add(_listed_key(name))
    return frozenset(subjects)


def _listed_key(subject: str) -> str:
    """Numbers may have come through a spreadsheet or pandas, which write 1000011 as 1000011.0."""
    return _WHOLE.sub(r"\1", key_of(subject))

"""What came of a preparation, to the last volume: a table of those left out, figures, and a summary to print."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decovae.data.splits import COLUMN, key_of
from decovae.files import write_atomically
from decovae.preparation.candidates import Exclusion
from decovae.preparation.selection import counted

EXCLUDED = "excluded.csv"
REPORT = "report.json"
NOT_SPLIT = "not split"
SHOWN = 5


@dataclass(frozen=True)
class Outcome:
    """A finished preparation.

    Attributes:
        folder: of the store.
        entries: of the index, in its order.
        exclusions: everything else that was found, sorted as in ``excluded.csv``.
        notes: sentences on what a user might not expect.
    """

    folder: Path
    entries: Sequence[Mapping[str, Any]]
    exclusions: Sequence[Exclusion]
    notes: Sequence[str]

    @property
    def problems(self) -> list[Exclusion]:
        """The volumes that are left out though no rule asked for it."""
        return [exclusion for exclusion in self.exclusions if exclusion.kind == "problem"]

    def as_dict(self) -> dict[str, Any]:
        """Figures in JSON's types, a function of the volumes and of the options alone."""
        sessions: dict[str, set[str]] = defaultdict(set)
        for entry in self.entries:
            sessions[key_of(entry["subject"])].add(entry["session"])
        kinds = Counter(exclusion.kind for exclusion in self.exclusions)
        return {
            "found": len(self.entries) + len(self.exclusions),
            "prepared": len(self.entries),
            "subjects": len(sessions),
            "excluded_by_rules": kinds["rule"],
            "excluded_by_problems": kinds["problem"],
            "rules": _by_reason(self.exclusions, "rule"),
            "problems": _by_reason(self.exclusions, "problem"),
            "splits": self.splits(),
            "subjects_by_sessions": _tally(str(len(each)) for each in sessions.values()),
            "notes": list(self.notes),
        }

    def splits(self) -> dict[str, dict[str, int]]:
        """For each split its volumes and subjects."""
        volumes: Counter[str] = Counter()
        subjects: dict[str, set[str]] = defaultdict(set)
        for entry in self.entries:
            split = entry["columns"].get(COLUMN, NOT_SPLIT)
            volumes[split] += 1
            subjects[split].add(key_of(entry["subject"]))
        return {split: {"volumes": volumes[split], "subjects": len(subjects[split])} for split in sorted(volumes)}


def sorted_exclusions(exclusions: Iterable[Exclusion]) -> list[Exclusion]:
    """In the order of ``excluded.csv``, which is that of no file system."""
    return sorted(exclusions, key=lambda each: (each.subject, each.session, each.source, each.kind, each.reason))


def write_excluded(folder: Path, exclusions: Sequence[Exclusion]) -> None:
    """Write ``excluded.csv``: a row for each volume that was left out.

    Raises:
        OSError: the folder cannot be written.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["subject", "session", "source", "kind", "reason"])
    rows.writerows([each.subject, each.session, each.source, each.kind, each.reason] for each in exclusions)
    _write(folder / EXCLUDED, text.getvalue())


def write_report(outcome: Outcome, settings: Mapping[str, Any]) -> None:
    """Write ``report.json``.

    Raises:
        OSError: the folder cannot be written.
    """
    content = {**outcome.as_dict(), "settings": settings}
    _write(outcome.folder / REPORT, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def summary(outcome: Outcome) -> Iterator[str]:
    """Lines on what came in, what is in the store, and what is not and why."""
    figures = outcome.as_dict()
    yield (
        f"{outcome.folder}: {counted(figures['prepared'], 'volume')} of {counted(figures['subjects'], 'subject')}, "
        f"of {figures['found']} found."
    )
    splits = outcome.splits()
    if set(splits) != {NOT_SPLIT}:
        parts = [f"{name} {counted(each['volumes'], 'volume')} ({counted(each['subjects'], 'subject')})"
                 for name, each in splits.items()]  # fmt: skip
        yield f"  splits: {', '.join(parts)}"
    for kind, title in (("rules", "left out by rules"), ("problems", "left out because of problems")):
        reasons: dict[str, int] = figures[kind]
        if reasons:
            yield f"  {title}: {sum(reasons.values())}"
        for reason, count in list(reasons.items())[:SHOWN]:
            yield f"    {count} × {reason}"
        if len(reasons) > SHOWN:
            yield f"    and {sum(list(reasons.values())[SHOWN:])} for {len(reasons) - SHOWN} other reasons"
    if outcome.exclusions:
        yield f"  each with its reason: {outcome.folder / EXCLUDED}"
    for note in outcome.notes:
        yield f"  note: {note}"


def _by_reason(exclusions: Iterable[Exclusion], kind: str) -> dict[str, int]:
    return _tally(_reason(each) for each in exclusions if each.kind == kind)


def _reason(exclusion: Exclusion) -> str:
    """A reason without what only this volume has, so that volumes with the same one are counted together."""
    if exclusion.kind == "rule" and (rule := re.search(r"\((rule .+)\)", exclusion.reason)):
        return rule.group(1)
    reason, _, _ = exclusion.reason.replace(exclusion.source, "…").partition(": ")
    return re.sub(r"(?<!\w)\d[\d.,×]*(e[+-]?\d+)?", "N", reason)


def _tally(things: Iterable[str]) -> dict[str, int]:
    """The commonest first, and in the order of the alphabet where they are as common."""
    return dict(sorted(Counter(things).items(), key=lambda item: (-item[1], item[0])))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))

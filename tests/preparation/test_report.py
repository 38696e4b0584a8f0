"""What a preparation says of itself: every volume is counted once, and alike ones together."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from decovae.preparation.candidates import Exclusion, Kind
from decovae.preparation.report import Outcome, sorted_exclusions, summary, write_excluded, write_report


def entry(subject: str, session: str, **columns: str) -> dict[str, Any]:
    return {"subject": subject, "session": session, "source": f"{subject}{session}.nii", "columns": columns}


def left_out(source: str, reason: str, kind: Kind = "problem") -> Exclusion:
    return Exclusion(source.removesuffix(".nii"), "", source, kind, reason)


ENTRIES = [
    entry("a", "1", split="train"),
    entry("a", "2", split="train"),
    entry("b", "1", split="validation"),
    entry("c", "1", split="train"),
]
EXCLUSIONS = [
    left_out("d.nii", "Code G301 (rule G30) in column p41270.", "rule"),
    left_out("e.nii", "Code G309 (rule G30) in column 41270-0.3.", "rule"),
    left_out("f.nii", "Column age is 44 (rule age<45).", "rule"),
    left_out("g.nii", "The volume g.nii is truncated: 1,200 bytes are promised, 17 are there."),
    left_out("h.nii", "The volume h.nii is truncated: 99 bytes are promised, 3 are there."),
    left_out("i.nii", "The volume i.nii is 4D (3×4×5×6): split it into 3D volumes."),
]


def test_alike_reasons_are_counted_together(tmp_path: Path) -> None:
    figures = Outcome(tmp_path, ENTRIES, EXCLUSIONS, ["A note."]).as_dict()
    assert figures == {
        "found": 10,
        "prepared": 4,
        "subjects": 3,
        "excluded_by_rules": 3,
        "excluded_by_problems": 3,
        "rules": {"rule G30": 2, "rule age<45": 1},
        "problems": {"The volume … is truncated": 2, "The volume … is ND (N)": 1},
        "splits": {"train": {"volumes": 3, "subjects": 2}, "validation": {"volumes": 1, "subjects": 1}},
        "subjects_by_sessions": {"1": 2, "2": 1},
        "notes": ["A note."],
    }


def test_the_summary_says_it_in_lines(tmp_path: Path) -> None:
    lines = list(summary(Outcome(tmp_path, ENTRIES, EXCLUSIONS, ["A note."])))
    assert lines == [
        f"{tmp_path}: 4 volumes of 3 subjects, of 10 found.",
        "  splits: train 3 volumes (2 subjects), validation 1 volume (1 subject)",
        "  left out by rules: 3",
        "    2 × rule G30",
        "    1 × rule age<45",
        "  left out because of problems: 3",
        "    2 × The volume … is truncated",
        "    1 × The volume … is ND (N)",
        f"  each with its reason: {tmp_path / 'excluded.csv'}",
        "  note: A note.",
    ]
    (line,) = summary(Outcome(tmp_path, [entry("a", "")], [], []))
    assert line.endswith("1 volume of 1 subject, of 1 found.")


def test_many_reasons_are_cut_short(tmp_path: Path) -> None:
    reasons = [left_out(f"{letter}.nii", f"Because of {letter}.") for letter in "abcdefgh"]
    lines = list(summary(Outcome(tmp_path, ENTRIES[:1], reasons, [])))
    assert "    and 3 for 3 other reasons" in lines


def test_files_are_what_was_said(tmp_path: Path) -> None:
    odd = [left_out('ü "x", y.nii', "Line\nbreak; and a name that is no text: \udcff.")]
    for exclusions in (EXCLUSIONS, odd, []):
        write_excluded(tmp_path, exclusions)
        with (tmp_path / "excluded.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["subject", "session", "source", "kind", "reason"]
        assert [row[2] for row in rows[1:]] == [exclusion.source for exclusion in exclusions]
    outcome = Outcome(tmp_path, ENTRIES, odd, [])
    write_report(outcome, {"volume": {"grid": (1, 2, 3)}})
    written = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert written["settings"] == {"volume": {"grid": [1, 2, 3]}}
    assert written["splits"] == outcome.splits()


def test_the_order_is_that_of_the_names() -> None:
    assert sorted_exclusions(EXCLUSIONS[::-1]) == EXCLUSIONS

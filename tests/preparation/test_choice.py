"""Who takes part, from what was found, a table, rules and a list, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.preparation.choice import choose
from decovae.preparation.config import PrepareConfig
from decovae.preparation.rules import Rules
from decovae.preparation.tables import TableOptions
from decovae.preparation.volume import Preparation


def test_whoever_withdrew_is_left_out_by_the_list_though_no_longer_in_the_table(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"sub-{number}_T1w.nii").touch()
    (tmp_path / "table.csv").write_text("eid,p41270,age\n0,,40\n1,G301,50\n")
    (tmp_path / "withdrawn.txt").write_text("2\n")
    rules = Rules(codes=("G30",), subjects=tmp_path / "withdrawn.txt")
    table = TableOptions(path=tmp_path / "table.csv", columns=("age",))
    chosen = choose(PrepareConfig(source=tmp_path, exclude=rules, table=table), tmp_path)
    assert [(each.subject, dict(each.columns)) for each in chosen.candidates] == [("sub-0", {"age": "40"})]
    assert {each.subject: each.kind for each in chosen.exclusions} == {
        "sub-1": "rule",
        "sub-2": "rule",
        "sub-3": "problem",
    }
    assert chosen.notes == [
        "List withdrawn.txt: 1 of its 1 subjects are among the volumes'.",
        "Rule G30: applies to 1 of 2 volumes.",
    ]


def test_masks_that_nobody_has_are_noticed_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.nii").touch()
    manifest = tmp_path / "cohort.csv"
    for text in ("path\na.nii\n", "path,mask\na.nii,n/a\n"):
        manifest.write_text(text)
        options = PrepareConfig(source=manifest, volume=Preparation(mask="column"))
        with pytest.raises(InputError, match=r"--volume\.mask column: none of the 1 volumes has a mask"):
            choose(options, manifest)
    manifest.write_text("path,mask\na.nii,none.nii\n")
    assert len(choose(PrepareConfig(source=manifest), manifest).candidates) == 1

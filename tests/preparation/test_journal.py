"""What is noted of a preparation tells what of it is done, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.journal import Journal, stamp_of
from tests.data.stores import GRID, entry_of
from tests.preparation.sources import make_volumes


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    [path] = make_volumes(tmp_path / "source", 1)
    return Candidate("sub-00", "", path, path.name)


def test_a_line_can_be_read_as_soon_as_it_is_noted(tmp_path: Path, candidate: Candidate) -> None:
    journal = Journal(tmp_path, {"fit": "resize"}, grid=GRID)
    with journal.appending() as lines:
        lines.note(candidate, stamp_of(candidate), entry_of(0))
        assert Journal(tmp_path, {"fit": "resize"}, grid=GRID).sources == {candidate.source}


def test_a_volume_is_not_the_same_with_another_mask(tmp_path: Path, candidate: Candidate) -> None:
    masks = [tmp_path / "one.nii", tmp_path / "other.nii"]
    for mask in masks:
        mask.write_bytes(bytes(10))
        os.utime(mask, ns=(1, 1))
    stamps = [stamp_of(replace(candidate, mask=mask)) for mask in (None, *masks)]
    assert None not in stamps
    assert all(stamps.count(stamp) == 1 for stamp in stamps)
    assert str(tmp_path) not in repr(stamps)
    os.utime(masks[0], ns=(2, 2))
    assert stamp_of(replace(candidate, mask=masks[0])) not in stamps


@pytest.mark.parametrize("head", ['{"settings":{}}', '{"version":1}', "[]", "nonsense", '{"version":1,"settings":3}'])
def test_a_damaged_journal_is_named(tmp_path: Path, head: str) -> None:
    (tmp_path / "progress.jsonl").write_text(f"{head}\n")
    with pytest.raises(InputError, match="damaged; give another --out"):
        Journal(tmp_path, {}, grid=GRID)

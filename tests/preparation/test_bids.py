"""A BIDS dataset is prepared as its names and tables have it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from decovae.data.store import open_store
from decovae.errors import InputError
from decovae.preparation.config import PrepareConfig
from decovae.preparation.run import prepare
from decovae.preparation.survey import SurveyOptions, survey
from decovae.preparation.volume import Preparation
from tests.data.files import noise, write

SESSIONS = [(subject, session) for subject in ("sub-01", "sub-02") for session in ("ses-a", "ses-b")]

MISPLACED = "It does not lie where BIDS has it: in its subject's, its session's, and then a folder such as anat."
MISNAMED = "It is not named as BIDS has it: sub-XXX_…_T1w.nii, with its session, if any, after the subject."


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two subjects, two sessions, T1w and T2w, tables and a derivative."""
    root = tmp_path / "bids"
    root.mkdir()
    (root / "dataset_description.json").write_text('{"Name": "two", "BIDSVersion": "1.9.0"}')
    for number, (subject, session) in enumerate(SESSIONS):
        for suffix in ("T1w", "T2w"):
            name = f"{subject}/{session}/anat/{subject}_{session}_run-1_{suffix}.nii.gz"
            write(root / name, noise(seed=2 * number + (suffix == "T2w")))
    write(root / "derivatives/x/sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", noise(seed=9))
    write(root / "sourcedata/sub-01/anat/sub-01_T1w.nii.gz", noise(seed=10))
    (root / "participants.tsv").write_text("participant_id\tsex\tage\nsub-01\tF\t50\nsub-02\tn/a\t61\n")
    (root / "sub-01/sub-01_sessions.tsv").write_text("session_id\tage\nses-a\t50.1\nses-b\tn/a\n")
    return root


def surveyed(root: Path, suffix: str = "T1w") -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    result = survey(root, SurveyOptions(suffix=suffix))
    return (
        {each.source: dict(each.columns) for each in result.candidates},
        {each.source: each.reason for each in result.exclusions},
        result.notes,
    )


def test_two_subjects_with_two_sessions_are_prepared_right(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    prepare(PrepareConfig(source=dataset, out=out, workers=0, pictures=False, volume=Preparation(grid=(12, 14, 10))))
    entries = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    assert [(entry["subject"], entry["session"]) for entry in entries] == SESSIONS
    assert [entry["source"].rpartition("/")[2] for entry in entries] == [
        f"{subject}_{session}_run-1_T1w.nii.gz" for subject, session in SESSIONS
    ]
    assert [entry["columns"] for entry in entries] == [
        {"sex": "F", "age": "50.1"},
        {"sex": "F", "age": "50"},
        {"sex": "", "age": "61"},
        {"sex": "", "age": "61"},
    ]
    store = open_store(out)
    for number, entry in enumerate(entries):
        expected = noise(seed=2 * number)
        low, high = np.percentile(expected, (0, 99.5))
        stored = (store.read(number).astype(np.float64) - entry["low"]) / (entry["high"] - entry["low"])
        np.testing.assert_allclose(stored, (expected - low) / (high - low), atol=1e-3)
    report = json.loads((out / "report.json").read_text())
    assert report["notes"] == ["4 other images not taken: 4 T2w."]


def test_any_suffix_can_be_asked_for(dataset: Path) -> None:
    taken, left_out, notes = surveyed(dataset, "T2w")
    assert [source.rpartition("_")[2] for source in taken] == ["T2w.nii.gz"] * 4
    assert not left_out
    assert notes == ["4 other images not taken: 4 T1w."]
    with pytest.raises(InputError, match=r"not 'T1w\.nii'"):
        surveyed(dataset, "T1w.nii")


def test_what_lies_or_is_not_where_it_should_be_is_told(dataset: Path) -> None:
    write(dataset / "sub-01/ses-a/anat/sub-02_ses-a_T1w.nii", noise())
    write(dataset / "sub-01/ses-a/anat/sub-01_T1w.nii", noise())
    write(dataset / "sub-01/ses-a/sub-01_ses-a_T1w.nii", noise())
    write(dataset / "sub-04_T1w.nii", noise())
    (dataset / "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz").symlink_to("../.git/annex/objects/x")
    (dataset / "sub-05").symlink_to("nowhere")
    write(dataset / "sub-03/func/sub-03_task-rest_bold.nii", noise())
    write(dataset / "sub-06/anat/sub-06_T1w.nii", noise())
    (dataset / "participants.tsv").write_text("participant_id\nsub-01\nsub-02\nsub-07\n")
    taken, left_out, notes = surveyed(dataset)
    assert len(taken) == 5
    assert left_out == {
        "sub-01/ses-a/anat/sub-02_ses-a_T1w.nii": MISPLACED,
        "sub-01/ses-a/anat/sub-01_T1w.nii": MISPLACED,
        "sub-01/ses-a/sub-01_ses-a_T1w.nii": MISPLACED,
        "sub-04_T1w.nii": MISPLACED,
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz": "It is a link to a file that is not here: fetch it with "
        "`datalad get`.",
        "sub-05": "It is a link to a file that is not here.",
    }
    assert notes == [
        "5 other images not taken: 4 T2w, 1 bold.",
        "1 subject without a file whose suffix is T1w: sub-03.",
        "1 subject not in participants.tsv: sub-06.",
        "1 subject in participants.tsv but without a folder: sub-07.",
    ]


def test_nothing_is_lost_beside_the_subjects(dataset: Path) -> None:
    misplaced = ("Sub-03/anat/sub-03_T1w.nii", "anat/sub-05_T1w.nii")
    misnamed = ("sub04/anat/sub04_T1w.nii", "other_T1w.nii", "sub-01/ses-a/anat/sub01_T1w.nii", "atlas/brain.nii")
    for seed, name in enumerate((*misplaced, *misnamed, "Sub-03/anat/sub-03_T2w.nii", "sub-01/ses-a/anat/brain.nii")):
        write(dataset / name, noise(seed=20 + seed))
    (dataset / "old.mgz").touch()
    (dataset / "code").mkdir()
    (dataset / "code/template_T1w.nii").touch()
    (dataset / "sub-01/ses-c").symlink_to("nowhere")
    (dataset / ".git").mkdir()
    taken, left_out, notes = surveyed(dataset)
    assert len(taken) == 4
    assert left_out == {
        **dict.fromkeys(misplaced, MISPLACED),
        **dict.fromkeys(misnamed, MISNAMED),
        "old.mgz": "It is in FreeSurfer's format: convert it with `mri_convert`.",
    }
    assert notes == [
        "6 other images not taken: 1 not named as BIDS has it, 5 T2w.",
        "1 hidden files or folders passed by.",
        "1 link to nothing, such as sub-01/ses-c: volumes behind them are not taken.",
    ]


def test_links_between_subjects_and_to_the_dataset_cost_nobody_anything(dataset: Path) -> None:
    (dataset / "sub-01/up").symlink_to("..")
    (dataset / "sub-01/friend").symlink_to("../sub-02")
    (dataset / "sub-03").symlink_to("sub-02")
    taken, left_out, _ = surveyed(dataset)
    assert len(taken) == 4
    assert left_out == {
        "sub-01/friend": "It is a link to a folder that is searched as sub-02.",
        "sub-03": "It is a link to a folder that is searched as sub-02.",
    }


def test_rows_may_be_of_sessions_and_must_not_contradict_each_other(dataset: Path) -> None:
    table = dataset / "participants.tsv"
    table.write_text(
        "participant_id\tsession_id\tage\nsub-01\tses-a\t50\nsub-01\tses-b\t51\nsub-02\tses-a\t7\nsub-02\tses-a\t8\n"
    )
    (dataset / "sub-01/sub-01_sessions.tsv").unlink()
    taken, left_out, _ = surveyed(dataset)
    assert list(taken.values()) == [{"age": "50"}, {"age": "51"}, {}]
    assert list(left_out.values()) == ["participants.tsv contradicts itself about it in lines 4 and 5."]


def test_a_bad_table_of_sessions_is_its_subjects_problem_alone(dataset: Path) -> None:
    (dataset / "sub-01/sub-01_sessions.tsv").write_text("session\tage\nses-a\t50\n")
    taken, left_out, _ = surveyed(dataset)
    assert {source[:6] for source in taken} == {"sub-02"}
    assert set(left_out.values()) == {
        "Its sessions are not known: The table sub-01_sessions.tsv has no column 'session_id'; it has session, age."
    }
    (dataset / "participants.tsv").write_text('participant_id\thand\nsub-02\t"left" handed\n')
    (dataset / "sub-01/sub-01_sessions.tsv").unlink()
    assert {"hand": '"left" handed'} in surveyed(dataset)[0].values()
    (dataset / "participants.tsv").write_text("participant_id\tage\nsub-02\t50\t60\n")
    with pytest.raises(InputError, match=r"participants\.tsv has 3 cells for 2 columns in line 2"):
        surveyed(dataset)
    (dataset / "participants.tsv").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"participants\.tsv cannot be read"):
        surveyed(dataset)


def test_a_derivative_dataset_of_its_own_and_one_without_sessions_or_tables(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    names = ("sub-1/anat/sub-1_space-MNI152_desc-preproc_T1w.nii", "sub-1/anat/sub-1_desc-brain_mask.nii")
    for name in names:
        write(tmp_path / name, noise())
    taken, left_out, notes = surveyed(tmp_path)
    assert (taken, left_out) == ({names[0]: {}}, {})
    assert notes == ["1 other image not taken: 1 mask."]
    (tmp_path / "sub-1").rename(tmp_path / "subject-1")
    with pytest.raises(InputError, match="no folder sub-"):
        surveyed(tmp_path)

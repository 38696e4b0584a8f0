"""Which files are found, whose they are, in which order."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from decovae.data.sources import find_volumes, session_of, subject_of
from decovae.errors import InputError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root: Path) -> list[tuple[str, str]]:
    folder = root if root.is_dir() else root.parent
    return [(subject, path.relative_to(folder).as_posix()) for subject, path, *_ in find_volumes(root)]


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("sub-07/ses-1/anat/sub-07_ses-1_T1w.nii.gz", "sub-07"),
        ("ses-1/sub-A1b_T1w.nii", "sub-A1b"),
        ("sub-0003.nii.gz", "sub-0003"),
        ("scans/patient 4.nii.gz", "patient 4"),
        ("scans/B.NII", "B"),
        ("Größe.nii.gz", "Größe"),
        ("sub-01-draft/x.y.nii", "x.y"),
        ("1000011_20252_2_0.nii", "1000011"),
        ("1000011_20252_3_0/T1/T1_brain_to_MNI.nii.gz", "1000011"),
        ("1000011_20252_2_0/sub-07_T1w.nii", "sub-07"),
        ("10000112_20252_2_0.nii", "10000112_20252_2_0"),
    ],
)
def test_subject_is_the_bids_name_or_the_bare_name(path: str, subject: str) -> None:
    assert subject_of(PurePath(path)) == subject


def test_a_folder_is_searched_to_the_bottom_in_order_of_subject(tmp_path: Path) -> None:
    touch(tmp_path, "z/sub-02/b.nii", "a/sub-02/b.nii.gz", "y/sub-01.nii.gz", "x/sub-01.txt", "x/._sub-03.nii", "c.nii")
    assert found(tmp_path) == [
        ("c", "c.nii"),
        ("sub-01", "y/sub-01.nii.gz"),
        ("sub-02", "a/sub-02/b.nii.gz"),
        ("sub-02", "z/sub-02/b.nii"),
    ]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "data/site/sub-01.nii", "elsewhere/sub-02.nii")
    (tmp_path / "data/site/loop").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data/self").symlink_to("self")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data/twice").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data/first").symlink_to(tmp_path / "data/site", target_is_directory=True)
    assert found(tmp_path / "data") == [("sub-01", "site/sub-01.nii"), ("sub-02", "linked/sub-02.nii")]


def test_what_hides_or_is_no_volume_is_passed_by(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", ".git/annex/b.nii", "c.mgz", "lone.hdr", "d.img", "d.hdr", "e.nii.gz/readme")
    assert found(tmp_path) == [("a", "a.nii"), ("d", "d.img")]


@pytest.mark.parametrize(
    ("path", "session"),
    [
        ("sub-07/ses-1/anat/sub-07_ses-1_T1w.nii.gz", "ses-1"),
        ("sub-07_ses-b2_T1w.nii", "ses-b2"),
        ("sub-07_T1w.nii", ""),
        ("courses-1/x.nii", ""),
    ],
)
def test_session_is_bids_name(path: str, session: str) -> None:
    assert session_of(PurePath(path)) == session


def test_a_folder_above_the_root_names_no_subject(tmp_path: Path) -> None:
    touch(tmp_path, "sub-99/data/scan.nii")
    assert found(tmp_path / "sub-99" / "data") == [("scan", "scan.nii")]


def test_manifest_paths_are_relative_to_it_and_may_be_absolute(tmp_path: Path) -> None:
    touch(tmp_path, "lists/near/sub-2.nii", "far/scan.nii.gz")
    manifest = tmp_path / "lists" / "cohort.csv"
    manifest.write_text(f"age, path ,subject\n50,near/sub-2.nii,\n60,{tmp_path}/far/scan.nii.gz,anna\n\n", "utf-8-sig")
    assert [(subject, path.resolve()) for subject, path, *_ in find_volumes(manifest)] == [
        ("anna", tmp_path / "far/scan.nii.gz"),
        ("sub-2", tmp_path / "lists/near/sub-2.nii"),
    ]


def test_other_columns_of_a_manifest_are_kept(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    manifest = tmp_path / "cohort.csv"
    manifest.write_text("path, age ,sex,,subject\na.nii, 63 ,F,x,one\nb.nii,41\nc.nii,,M,y,three,,\n")
    assert [(subject, columns) for subject, _, columns, _ in find_volumes(manifest)] == [
        ("b", {"age": "41", "sex": ""}),
        ("one", {"age": "63", "sex": "F"}),
        ("three", {"age": "", "sex": "M"}),
    ]
    assert all(columns == {} for _, _, columns, _ in find_volumes(tmp_path))


def test_paths_to_nothing_are_returned_if_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    manifest = tmp_path / "cohort.csv"
    manifest.write_text("path\nb.nii\na.nii\n")
    found = find_volumes(manifest, all_there=False)
    assert [(source.subject, source.path.is_file()) for source in found] == [("a", True), ("b", False)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("file,subject\na.nii,1\n", "has no column 'path'; it has file, subject"),
        ("", "has no column 'path'; it has none"),
        ("path\n", "lists no volumes"),
        ("path,subject\n,1\n", "has no path in line 2"),
        ("subject,path\n1\n", "has no path in line 2"),
        (
            "path\na.nii\nb.nii\nc.nii\n",
            r"b\.nii in line 3, which does not exist \(1 more of its files cannot be opened\)",
        ),
        (b"path\n\xff\xfe\n", "cannot be read as CSV"),
        ("path,subject,age\na.nii,1,40,5\n", "has 4 cells for 3 columns in line 2"),
        ("path,subject\nn/a,1\n", "has no path in line 2"),
        ("path\n.\n", "in line 2, which is a folder"),
    ],
)
def test_bad_manifest_is_named(tmp_path: Path, content: str | bytes, expected: str) -> None:
    touch(tmp_path, "a.nii")
    manifest = tmp_path / "cohort.csv"
    manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"cohort\.csv.*{expected}"):
        find_volumes(manifest)


def test_roots_without_volumes_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "empty/readme.txt", "scan.nii")
    with pytest.raises(InputError, match=r"no \.nii or \.nii\.gz file anywhere below .*empty"):
        find_volumes(tmp_path / "empty")
    with pytest.raises(InputError, match="nowhere does not exist"):
        find_volumes(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"scan\.nii is neither a folder"):
        find_volumes(tmp_path / "scan.nii")


def test_a_table_set_apart_otherwise_and_its_sessions(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b_ses-2.nii")
    rows = ("path\tsubject\tsession\tmask\tage", "a.nii\tn/a\tses-9\tm.nii\t3", "b_ses-2.nii\tNA\tNaN", "\t\t\t")
    (tmp_path / "cohort.tsv").write_text("\n".join(rows))
    assert [(each.subject, each.session, each.columns) for each in find_volumes(tmp_path / "cohort.tsv")] == [
        ("a", "ses-9", {"age": "3"}),
        ("b_ses-2", "ses-2", {"age": ""}),
    ]


def test_visits_to_uk_biobank_are_sessions() -> None:
    assert session_of(PurePath("1000011_20252_3_0.nii")) == "3"
    assert session_of(PurePath("1000011_20252_2_0/T1/x.nii.gz")) == "2"

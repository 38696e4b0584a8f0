"""Every file that is or should be a volume comes out, as a candidate or with the reason why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from decovae.data.nifti import read_nifti
from decovae.data.sources import find_volumes
from decovae.errors import InputError
from decovae.preparation.journal import stamp_of
from decovae.preparation.survey import Survey, SurveyOptions, survey
from tests.privileges import folder_of_all, unprivileged


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(result: Survey) -> list[tuple[str, str, str]]:
    return [(each.subject, each.session, each.source) for each in result.candidates]


def left_out(result: Survey) -> dict[str, str]:
    assert all(each.kind == "problem" and each.reason.endswith(".") for each in result.exclusions)
    return {each.source: each.reason for each in result.exclusions}


def of(root: Path, **options: object) -> Survey:
    return survey(root, SurveyOptions(**options))  # type: ignore[arg-type]


def listed(folder: Path, text: str, name: str = "cohort.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, "utf-8-sig")
    return folder / name


def test_a_folder_gives_what_training_on_it_would_find(tmp_path: Path) -> None:
    names = ("sub-02/ses-b/x.nii", "sub-02/ses-a/x.nii.gz", "c d/Größe.NII", "pair.hdr", "pair.img", "notes.txt")
    touch(tmp_path, *names, ".git/y.nii", "._c.nii")
    result = of(tmp_path)
    assert found(result) == [
        ("Größe", "", "c d/Größe.NII"),
        ("pair", "", "pair.img"),
        ("sub-02", "ses-a", "sub-02/ses-a/x.nii.gz"),
        ("sub-02", "ses-b", "sub-02/ses-b/x.nii"),
    ]
    assert not result.exclusions
    assert result.notes == ["2 hidden files or folders passed by."]
    sources = find_volumes(tmp_path)
    assert [(each.subject, each.session, each.path) for each in sources] == [
        (each.subject, each.session, each.path) for each in result.candidates
    ]


def test_what_cannot_be_a_volume_is_left_out_with_what_to_do(tmp_path: Path) -> None:
    touch(tmp_path, "good.nii", "alone.hdr", "half.img.gz", "old.mgz", "a/b.nrrd", "c.MHA", "d.mnc", "e.nii.bz2")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "annexed.nii").symlink_to(".git/annex/objects/xx/yy")
    (tmp_path / "gone.nii").symlink_to("nowhere")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    result = of(tmp_path)
    assert found(result) == [("good", "", "good.nii")]
    assert left_out(result) == {
        "a/b.nrrd": "It is in NRRD format: convert it to NIfTI, for example with `c3d` or 3D Slicer.",
        "alone.hdr": "It is half of a .hdr/.img pair, and its other half, alone.img, is not beside it.",
        "annexed.nii": "It is a link to a file that is not here: fetch it with `datalad get`.",
        "c.MHA": "It is in MetaImage format: convert it to NIfTI, for example with `c3d` or 3D Slicer.",
        "d.mnc": "It is in MINC format: convert it with `mnc2nii`.",
        "e.nii.bz2": "It is compressed by other means than gzip: decompress it.",
        "folder.nii.gz": "It is a folder with a volume's name, and there is no volume in it.",
        "gone.nii": "It is a link to a file that is not here.",
        "half.img.gz": "It is half of a .hdr/.img pair, and its other half, half.hdr.gz, is not beside it.",
        "loop.nii": "It is a link that leads to itself.",
        "old.mgz": "It is in FreeSurfer's format: convert it with `mri_convert`.",
        "pipe.nii": "It is a pipe, a socket or a device.",
    }


def test_a_folder_with_a_volumes_name_and_volumes_in_it_is_only_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "x.nii/x.nii")
    assert found(of(tmp_path)) == [("x", "", "x.nii/x.nii")]
    assert not left_out(of(tmp_path))


def test_links_to_what_may_have_been_folders_of_volumes_are_told_of(tmp_path: Path) -> None:
    touch(tmp_path, "good.nii", "README")
    (tmp_path / "sub-07").symlink_to("nowhere")
    result = of(tmp_path)
    assert not result.exclusions
    assert result.notes == ["1 link to nothing, such as sub-07: volumes behind them are not taken."]


def test_loops_of_links_end_and_nothing_is_found_twice_or_lost(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/sub-01.nii", "data/b/sub-03.nii", "elsewhere/deep/sub-02.nii", "bare/readme.txt")
    links = {"a/up": "data", "a/b": "data/b", "one": "elsewhere", "two": "elsewhere", "deep": "elsewhere/deep"}
    for link, target in {**links, "x": "bare", "y": "bare"}.items():
        (tmp_path / "data" / link).symlink_to(tmp_path / target, target_is_directory=True)
    result = of(tmp_path / "data")
    assert found(result) == [
        ("sub-01", "", "a/sub-01.nii"),
        ("sub-02", "", "deep/sub-02.nii"),
        ("sub-03", "", "b/sub-03.nii"),
    ]
    assert left_out(result) == {
        "a/b": "It is a link to a folder that is searched as b.",
        "one/deep": "It is a folder that is searched as deep.",
        "two": "It is a link to a folder that is searched as one.",
    }


def test_the_second_of_two_subjects_that_are_links_to_one_folder_is_told_of(tmp_path: Path) -> None:
    touch(tmp_path, "disk/x/T1.nii")
    (tmp_path / "data").mkdir()
    for subject in ("sub-01", "sub-02"):
        (tmp_path / "data" / subject).symlink_to("../disk/x")
    for options in ({}, {"match": "*.nii"}):
        result = of(tmp_path / "data", **options)
        assert found(result) == [("sub-01", "", "sub-01/T1.nii")]
        assert left_out(result) == {"sub-02": "It is a link to a folder that is searched as sub-01."}


def closed_folders(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What a survey says of a folder, and what training on it, on parts of it and on a manifest of it does."""
    errors = []
    for root in (folder, folder / "no-x", folder / "no-x/below", folder / "cohort.csv"):
        with pytest.raises(InputError) as caught:
            find_volumes(root)
        errors.append(str(caught.value))
    for root in (folder / "no-r", folder / "no-x"):
        with pytest.raises(InputError, match="cannot be read"):
            of(root)
    result = of(folder)
    assert found(result) == [("good", "", "good.nii"), ("q", "", "pair/q.img")]
    with pytest.raises(InputError, match=r"q\.img cannot be read: its other half, .*\(Permission denied"):
        read_nifti(folder / "pair/q.img")
    return left_out(result), errors


@pytest.mark.parametrize("bids", [False, True])
def test_folders_that_cannot_be_read_are_left_out_and_stop_training_on_them(bids: bool) -> None:
    with folder_of_all() as root:
        touch(root, "good.nii", "no-r/x.nii", "no-x/x.nii", "no-x/below/y.nii", "no-x/p.hdr", "no-x/p.img")
        (root / "link.nii").symlink_to("no-x/x.nii")
        (root / "sub-link").symlink_to("no-x/below")
        touch(root, "pair/q.img")
        (root / "pair/q.hdr").symlink_to("../no-x/p.hdr")
        listed(root, "path\nno-x/x.nii\ngood.nii\nlink.nii\n")
        (root / "no-r").chmod(0)
        (root / "no-x").chmod(0o644)
        if bids:
            touch(root, "dataset_description.json", "sub-01/anat/sub-01_T1w.nii")
            result = unprivileged(of, root)
            assert found(result) == [("sub-01", "", "sub-01/anat/sub-01_T1w.nii")]
            assert set(left_out(result)) == {"no-r", "no-x", "link.nii", "sub-link", "good.nii", "pair/q.img"}
            return
        reasons, errors = unprivileged(closed_folders, root)
        closed = "It is a folder that cannot be read (Permission denied), so nobody knows what is in it."
        assert reasons == {
            "no-r": closed,
            "no-x": closed,
            "link.nii": "It cannot be read (Permission denied).",
            "sub-link": "It is a link that cannot be followed (Permission denied), so nobody knows what is in it.",
        }
        assert all(message.endswith("(Permission denied).") or "(1 more of" in message for message in errors)
        assert "no-x/x.nii in line 2, which cannot be read (Permission denied)" in errors[-1]
        result = unprivileged(of, root / "cohort.csv")
        assert found(result) == [("good", "", "good.nii")]
        assert left_out(result) == {
            "no-x/x.nii": "Line 2 of cohort.csv names no-x/x.nii, which cannot be read (Permission denied).",
            "link.nii": "Line 4 of cohort.csv names link.nii, which cannot be read (Permission denied).",
        }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf_8_are_escaped_and_can_be_opened(tmp_path: Path) -> None:
    touch(tmp_path, "a\udcff.nii", "tab\tline\n.nii")
    result = of(tmp_path)
    assert found(result) == [("a\\xff", "", "a\\xff.nii"), ("tab\tline\n", "", "tab\tline\n.nii")]
    assert all(each.path.is_file() for each in result.candidates)
    assert [each.subject for each in find_volumes(tmp_path)] == [each.subject for each in result.candidates]


def test_two_names_that_are_written_alike_do_not_hide_each_other(tmp_path: Path) -> None:
    touch(tmp_path, "a\udcff.nii", "a\\xff.nii")
    result = of(tmp_path)
    assert len(result.candidates) == 1
    assert left_out(result) == {"a\\xff.nii": "Another file's path is written in the same way."}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/T1.nii.gz", {"a/T1.nii.gz", "a/b/T1.nii.gz", "T1.nii.gz"}),
        ("T1.nii.gz", {"a/T1.nii.gz", "a/b/T1.nii.gz", "T1.nii.gz"}),
        ("*/T1.nii.gz", {"a/T1.nii.gz"}),
        ("a/**", {"a/T1.nii.gz", "a/b/T1.nii.gz", "a/b/T2.nii", "a/old.mgz"}),
        ("T[!1].nii", {"a/b/T2.nii"}),
        ("T?.nii*", {"a/T1.nii.gz", "a/b/T1.nii.gz", "T1.nii.gz", "a/b/T2.nii"}),
        ("*.mgz", {"a/old.mgz"}),
        ("[z.nii", set()),
    ],
)
def test_only_what_matches_is_taken_or_complained_of(tmp_path: Path, pattern: str, expected: set[str]) -> None:
    touch(tmp_path, "a/T1.nii.gz", "a/b/T1.nii.gz", "T1.nii.gz", "a/b/T2.nii", "a/old.mgz")
    result = of(tmp_path, match=pattern)
    assert {each.source for each in [*result.candidates, *result.exclusions]} == expected
    count = 5 - len(expected)
    assert result.notes[0] == f"{count} file{'s' if count > 1 else ''} did not match {pattern!r}."


def test_subject_and_session_come_from_the_path_as_asked(tmp_path: Path) -> None:
    touch(tmp_path, "1000123_20252_2_0/T1/brain.nii.gz", "1000123_20252_3_0/T1/brain.nii.gz", "readme/brain.nii.gz")
    result = of(tmp_path, subject=r"(?P<subject>\d{7})_20252_(?P<session>\d)_0/")
    assert found(result) == [
        ("1000123", "2", "1000123_20252_2_0/T1/brain.nii.gz"),
        ("1000123", "3", "1000123_20252_3_0/T1/brain.nii.gz"),
    ]
    assert "finds no subject" in left_out(result)["readme/brain.nii.gz"]


def test_files_of_one_name_in_several_folders_are_remarked_on(tmp_path: Path) -> None:
    touch(tmp_path, "1/T1.nii", "2/T1.nii", "3/other.nii")
    assert of(tmp_path).notes == [
        "2 volumes count as those of 1 subject, for files have the same name, such as T1: say how paths name the "
        "subject if these are several."
    ]
    assert of(tmp_path, subject="(?P<subject>[0-9])/").notes == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"subject": "("}, "'(' of the option subject is none: missing"),
        ({"subject": "(?P<id>x)"}, "has no group named subject"),
        ({"match": "[z-a]"}, "'[z-a]' of the option match is none: bad character range"),
        ({"source_root": Path("/")}, "is for manifests"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path: Path, options: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        of(tmp_path, **options)
    assert expected in str(caught.value)


def test_roots_that_are_none_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "scan.nii")
    with pytest.raises(InputError, match="nowhere does not exist"):
        of(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a folder nor a manifest"):
        of(tmp_path / "scan.nii")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop"):
        of(tmp_path / "loop")


def test_a_manifest_gives_a_candidate_for_each_good_row(tmp_path: Path) -> None:
    touch(tmp_path, "b/sub-2_ses-1.nii", "a b.nii.gz", "pair.hdr", "pair.img", "mask.nii")
    manifest = listed(
        tmp_path,
        "path, subject,session,split,mask,age\n"
        f"b/sub-2_ses-1.nii,,,train,,50\n./b/../a b.nii.gz,anna,s1,val,mask.nii,61\n{tmp_path}/pair.hdr\n",
    )
    result = of(manifest)
    assert not left_out(result)
    assert found(result) == [
        ("anna", "s1", "a b.nii.gz"),
        ("pair", "", "pair.hdr"),
        ("sub-2", "ses-1", "b/sub-2_ses-1.nii"),
    ]
    assert [dict(each.columns) for each in result.candidates] == [
        {"split": "val", "age": "61"},
        {"split": "", "age": ""},
        {"split": "train", "age": "50"},
    ]
    assert [each.mask for each in result.candidates] == [tmp_path / "mask.nii", None, None]
    assert [each.path.name for each in result.candidates] == ["a b.nii.gz", "pair.img", "sub-2_ses-1.nii"]
    assert [each.subject for each in find_volumes(manifest)] == [each.subject for each in result.candidates]


@pytest.mark.parametrize("name", ["cohort.csv", "cohort.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_any_delimiter_is_understood(tmp_path: Path, delimiter: str, name: str) -> None:
    touch(tmp_path, "a.nii")
    text = f'age{delimiter}"path"\r\n"1,5"{delimiter}a.nii\r\n{delimiter}\r\n\r\n'
    result = of(listed(tmp_path, text, name))
    assert [(each.source, dict(each.columns)) for each in result.candidates] == [("a.nii", {"age": "1,5"})]
    assert not left_out(result)


def test_bad_rows_are_left_out_and_tell_their_line(tmp_path: Path) -> None:
    touch(tmp_path, "in/good.nii", "in/p.hdr", "in/p.img", "in/lone.img", "in/c.mgz", "out.nii", "inside.nii")
    (tmp_path / "in/folder.nii").mkdir()
    (tmp_path / "in/link.nii").symlink_to("../out.nii")
    rows = {
        "good.nii": "",
        "link.nii": "",
        "./good.nii": "names the same file as line 2",
        "p.hdr": "",
        "p.img": "names the same file as line 5",
        "missing.nii": "names missing.nii, which does not exist",
        "x\\y.nii": "names x\\y.nii, which does not exist (write / between folders, not \\)",
        "../out.nii": "names ../out.nii, which is not in the folder of the table; give a folder above both with",
        "a/../../out.nii": "names a/../../out.nii, which is not in the folder",
        "/etc/passwd": "names passwd, which is not in the folder",
        f"{tmp_path}/inside.nii": "names inside.nii, which is not in the folder",
        "C:\\Users\\anna\\y.nii": "names y.nii by a path of Windows: write it relative to the table, with /",
        ".": "names ., which is not in the folder",
        "folder.nii": "names folder.nii, which is a folder",
        "lone.img": "names lone.img, which is half of a pair, and its other half, lone.hdr, is not beside it",
        "c.mgz": "names c.mgz, which is in FreeSurfer's format",
    }
    result = of(listed(tmp_path / "in", "path,subject\n" + "".join(f"{path},s\n" for path in rows) + ",s\n"))
    assert {each.source for each in result.candidates} == {"good.nii", "link.nii", "p.hdr"}
    reasons = [each.reason for each in result.exclusions]
    assert len(reasons) == len(rows) + 1 - 3
    for line, expected in enumerate(rows.values(), 2):
        assert not expected or any(f"Line {line} of cohort.csv {expected}" in reason for reason in reasons), expected
    assert f"Line {len(rows) + 2} of cohort.csv names no path." in reasons
    told = "".join(f"{each.source} {each.reason}" for each in result.exclusions)
    assert str(tmp_path) not in told
    assert "anna" not in told
    assert "/etc" not in told


def test_masks_are_judged_as_volumes_are(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.nii", "in/b.nii", "mask.nii")
    result = of(listed(tmp_path / "in", "path,mask\na.nii,../mask.nii\nb.nii,none.nii\n"))
    assert not result.candidates
    assert "../mask.nii, which is not in the folder" in left_out(result)["a.nii"]
    assert "none.nii, which does not exist" in left_out(result)["b.nii"]


def test_masks_that_nobody_asked_for_do_not_matter(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    manifest = listed(tmp_path, "path,mask\na.nii,none.nii\n")
    result = survey(manifest, SurveyOptions(), masks=False)
    assert [(each.source, each.mask) for each in result.candidates] == [("a.nii", None)]
    assert stamp_of(result.candidates[0]) is not None


def test_what_stands_for_no_value_in_tables_names_nobody(tmp_path: Path) -> None:
    touch(tmp_path, "sub-1_ses-2.nii", "b.nii")
    rows = "path,subject,session,mask,age\nsub-1_ses-2.nii,n/a,NA,NaN,NA\nb.nii,NA,n/a,n/a,5\nNA,x,,,\n"
    result = of(listed(tmp_path, rows))
    assert found(result) == [("b", "", "b.nii"), ("sub-1", "ses-2", "sub-1_ses-2.nii")]
    assert [each.mask for each in result.candidates] == [None, None]
    assert [each.reason for each in result.exclusions] == ["Line 4 of cohort.csv names no path."]


def test_a_row_with_more_cells_than_columns_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    result = of(listed(tmp_path, "path,subject,age\na.nii,1,40,5\nb.nii,2,41,,\n"))
    assert found(result) == [("2", "", "b.nii")]
    assert left_out(result) == {"a.nii": "Line 2 of cohort.csv has 4 cells for 3 columns."}


def test_paths_may_be_relative_to_another_folder(tmp_path: Path) -> None:
    touch(tmp_path, "data/x/a.nii", "lists/b.nii")
    manifest = listed(tmp_path / "lists", f"path\nx/a.nii\nb.nii\n{tmp_path}/lists/b.nii\n")
    result = of(manifest, source_root=tmp_path / "data")
    assert [(each.source, each.path) for each in result.candidates] == [("x/a.nii", tmp_path / "data/x/a.nii")]
    assert [each.source for each in result.exclusions] == ["b.nii", "b.nii"]


def test_an_accent_may_be_spelt_otherwise_in_the_table_than_on_the_disk(tmp_path: Path) -> None:
    touch(tmp_path, "u\u0308.nii")
    (candidate,) = of(listed(tmp_path, "path\n\u00fc.nii\n")).candidates
    assert candidate.path.is_file()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has no column 'path'; it has none"),
        (b"file\na.nii\n", "has no column 'path'; it has file"),
        (b"path,age,age\na.nii,1,2\n", "has two columns named 'age'"),
        (b"path\n\xff\n", "cannot be read as CSV in UTF-8"),
        (b'path\n"a.nii\nb.nii\n', "cannot be read as CSV in UTF-8"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "cohort.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"cohort\.csv {expected}"):
        of(tmp_path / "cohort.csv")

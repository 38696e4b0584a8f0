"""What a table says of the subjects reaches their volumes, and only that; whom it does not know is not lost."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.columns import columns_named
from decovae.preparation.tables import join_table


def volume(subject: str, session: str = "", **columns: str) -> Candidate:
    source = f"{subject}{session}.nii"
    return Candidate(subject, session, Path(source), source, columns)


def table(folder: Path, text: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def columns_of(candidates: list[Candidate]) -> list[dict[str, str]]:
    return [dict(candidate.columns) for candidate in candidates]


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("41270", ["eid", "p41270", "p41271"], ["p41270"]),
        ("41270", ["41270-0.0", "41270-0.1", "141270-0.0", "41270-0.10"], ["41270-0.0", "41270-0.1", "41270-0.10"]),
        ("41270", ["f.41270.0.0", "f.4127.0.0"], ["f.41270.0.0"]),
        ("41270", ["p41270_i0_a3", "p41270_i1_a0", "p412700_i0"], ["p41270_i0_a3", "p41270_i1_a0"]),
        ("41270", ["participant.p41270", "s_41270_0_0", "41270"], ["participant.p41270", "s_41270_0_0", "41270"]),
        ("p41270", ["p41270", "p41270_i0"], ["p41270"]),
        ("p41270", ["p41270_i0", "p41270_i1"], ["p41270_i0", "p41270_i1"]),
        ("41270-0.1", ["41270-0.0", "41270-0.1"], ["41270-0.1"]),
        ("age", ["age", "Age", "age_2"], ["age"]),
        ("31", ["score 31", "310", "p31_i0"], ["p31_i0"]),
        ("age", ["sex"], []),
    ],
)
def test_columns_are_found_by_name_or_field(name: str, columns: list[str], found: list[str]) -> None:
    assert columns_named(name, columns) == found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("subject,age,note\n1,40,a b\n2,50,\n", "t.csv"),
        ("\ufeffsubject;age;note\r\n1;40;a b\r\n2;50;\r\n", "t.csv"),
        ("subject\tage\tnote\n1\t40\ta b\n2\t50\t\n", "t.txt"),
        ("subject\tage\tnote\n 1 \t40\ta b\n\n2\t 50\t\n\t\t\n", "t.tsv"),
        ('"eid"|"age"|"note"\n"1"|"40"|"a b"\n"2"|"50"|""\n', "t.csv"),
        ("age,participant_id,note\n40,sub-1,a b\n50,sub-2,,,\n", "t.csv"),
        ("EID,age,note\n1,40,a b\n2,50,\n", "t.csv"),
    ],
)
def test_tables_are_read_as_programs_and_excel_write_them(tmp_path: Path, text: str, name: str) -> None:
    joined, excluded = join_table([volume("1"), volume("2")], table(tmp_path, text, name), columns=["age", "note"])
    assert columns_of(joined) == [{"age": "40", "note": "a b"}, {"age": "50", "note": ""}]
    assert excluded == []


def test_only_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    path = table(tmp_path, "eid,41270-0.0,41270-0.1,31-0.0,qc\n1,G301,,0,ok\n2,,,1,fail\n3,,,1,ok\n")
    joined, _ = join_table([volume("2", site="x"), volume("1")], path, columns=["qc"], needed=["41270", "not there"])
    assert columns_of(joined) == [
        {"site": "x", "qc": "fail", "41270-0.0": "", "41270-0.1": ""},
        {"qc": "ok", "41270-0.0": "G301", "41270-0.1": ""},
    ]


@pytest.mark.parametrize(("subject", "row"), [("sub-01", "01"), ("01", "sub-01"), ("Zoe\u0301", "Zo\u00e9")])
def test_a_subject_is_found_with_or_without_prefix(tmp_path: Path, subject: str, row: str) -> None:
    joined, _ = join_table([volume(subject)], table(tmp_path, f"subject,age\n{row},40\n"), columns=["age"])
    assert columns_of(joined) == [{"age": "40"}]


def test_keys_are_text_not_numbers(tmp_path: Path) -> None:
    path = table(tmp_path, "subject,age\n1,40\n")
    joined, excluded = join_table([volume("01"), volume("1")], path, columns=["age"])
    assert [candidate.subject for candidate in joined] == ["1"]
    assert [(each.subject, each.kind) for each in excluded] == [("01", "problem")]


def test_a_subject_the_table_does_not_know_is_a_problem_with_all_its_sessions(tmp_path: Path) -> None:
    path = table(tmp_path, "eid,age\n1,40\n")
    joined, excluded = join_table([volume("1"), volume("2", "a"), volume("2", "b")], path)
    assert [candidate.source for candidate in joined] == ["1.nii"]
    assert [(each.session, each.kind, each.reason) for each in excluded] == [
        (session, "problem", "The table table.csv has no row of its subject: add one.") for session in "ab"
    ]


def test_what_is_said_twice_alike_is_no_contradiction(tmp_path: Path) -> None:
    joined, _ = join_table([volume("1", age="40")], table(tmp_path, "eid,age\n1,40\n"), columns=["age"])
    assert columns_of(joined) == [{"age": "40"}]


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("eid,age\n1,40\n1,41\n", "", "two rows of subject '1', in lines 2 and 3"),
        ("eid,age\n1,40\nsub-1,41\n", "", "two rows of subject 'sub-1', in lines 2 and 3"),
        ("name,age\n1,40\n", "", "no column subject, eid, participant_id to find subjects by.* there are name, age"),
        ("eid,age\n1,40\n", "id", "no column 'id' to find subjects by.* eid"),
        ("eid,sex\n1,0\n", "", "no column 'age'; there are eid, sex"),
        ("eid,age,age\n1,40,40\n", "", "two columns 'age'"),
        ("eid,age\n1\n", "", "1 cells in line 2 and 2 names"),
        ("eid,age\n1,40,x\n", "", "3 cells in line 2 and 2 names"),
        ('eid,age\n1,"40\n2,50\n', "", "cannot be read as CSV in UTF-8: unexpected end"),
        ("eid,age\n1,30\n", "", "'age' is '30' in .* and '40' beside the volumes"),
        (
            "eid,age\n7,30\n8,30\n",
            "",
            r"none of the volumes' subjects: .*'eid'.* such as '7'.* such as '1'.*--table.key",
        ),
        ("", "", "no column subject, .* there are no columns"),
        ("\n", "", "no column subject, "),
        ("eid,age\n1,4é\n".encode("latin-1"), "", "cannot be read as CSV in UTF-8: it holds other bytes"),
        ("eid,age\n1,40\n".encode("utf-16"), "", "cannot be read as CSV in UTF-8: it holds other bytes"),
        (b"\x1f\x8b\x08\x00\x00\x00", "", "cannot be read as CSV in UTF-8: it holds other bytes"),
        (b"eid,age\n1,4\x000\n", "", "line contains NUL|'age' is '4"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, text: str | bytes, key: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        join_table([volume("1", age="40")], table(tmp_path, text), key, columns=["age"])


def test_a_table_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.csv"):
        with pytest.raises(InputError, match=f"The table {path} cannot be read"):
            join_table([volume("1")], path)


def test_a_repeated_subject_that_is_not_there_is_nobodys_business(tmp_path: Path) -> None:
    joined, _ = join_table([volume("1")], table(tmp_path, "eid,age\n9,40\n9,41\n1,50\n"), columns=["age"])
    assert columns_of(joined) == [{"age": "50"}]


def test_memory_is_that_of_the_rows_that_are_kept(tmp_path: Path) -> None:
    wide = ",".join(f"{field}-0.0" for field in range(200))
    path = tmp_path / "wide.csv"
    with path.open("w") as file:
        file.write(f"eid,{wide}\n")
        file.writelines(f"{eid}{',abcdef' * 200}\n" for eid in range(4000))
    assert path.stat().st_size > 5_000_000
    tracemalloc.start()
    joined, _ = join_table([volume("17"), volume("3999")], path, columns=["7-0.0"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert columns_of(joined) == [{"7-0.0": "abcdef"}] * 2
    assert peak < 1_000_000

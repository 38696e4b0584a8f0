"""Who is left out, by which rule, in words; and that nobody is left out or kept where it is not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from decovae.errors import InputError
from decovae.preparation.candidates import Candidate
from decovae.preparation.rules import Rules, apply_rules, needed_columns
from decovae.preparation.tables import join_table


def volume(subject: str, session: str = "", **columns: str) -> Candidate:
    source = f"{subject}{session}.nii"
    return Candidate(subject, session, Path(source), source, columns)


def outcome(candidates: list[Candidate], rules: Rules) -> tuple[list[str], dict[str, tuple[str, str]]]:
    kept, excluded, _ = apply_rules(candidates, rules)
    assert {each.source for each in kept} | {each.source for each in excluded} == {each.source for each in candidates}
    return [each.subject for each in kept], {each.subject: (each.kind, each.reason) for each in excluded}


DIAGNOSES = {
    "1000011": [],
    "1000025": ["G301", "I64"],
    "1000032": ["K297", "C710"],
    "1000048": ["I639"],
    "1000054": ["K297", "Z961"],
}


@pytest.mark.parametrize(
    "export",
    [
        lambda codes: {"p41270": "|".join(codes)},
        lambda codes: {"p41270": json.dumps(codes)},
        lambda codes: {"participant.p41270": str(codes)},
        lambda codes: {"41270": f"[{'|'.join(codes)}]"},
        lambda codes: {f"41270-0.{place}": code for place, code in enumerate([*codes, "", ""][:2])},
        lambda codes: {f"f.41270.0.{place}": code for place, code in enumerate([*codes, "NA", "NA"][:2])},
        lambda codes: {"p41270": "|".join(f"{code[:3]}.{code[3:]} Disease, unspecified" for code in codes)},
    ],
    ids=["bars", "JSON", "Python", "brackets", "arrays", "R", "meanings"],
)
def test_diagnoses_of_uk_biobank_leave_subjects_out(
    tmp_path: Path, export: Callable[[list[str]], dict[str, str]]
) -> None:
    """Whatever tool exported field 41270 of a synthetic table with further fields around it."""
    cells = {eid: {"31-0.0": "1", **export(codes), "note, long": 'said "no"'} for eid, codes in DIAGNOSES.items()}
    names = ["eid", *next(iter(cells.values()))]
    lines = [names, *([eid, *row.values()] for eid, row in cells.items())]
    path = tmp_path / "ukb.csv"
    path.write_text("\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines) + "\n")
    rules = Rules(codes=("G30", "C70-C72", "I6"))
    joined, _ = join_table([volume(eid) for eid in DIAGNOSES], path, needed=needed_columns(rules))
    kept, excluded = outcome(joined, rules)
    assert kept == ["1000011", "1000054"]
    columns = [name for name in names if "41270" in name]
    assert {eid: kind for eid, (kind, _) in excluded.items()} == dict.fromkeys(
        ["1000025", "1000032", "1000048"], "rule"
    )
    assert excluded["1000025"][1] == f"Code G301 (rule G30) in column {columns[0]}."
    assert excluded["1000032"][1] == f"Code C710 (rule C70-C72) in column {columns[-1]}."
    assert excluded["1000048"][1] == f"Code I639 (rule I6) in column {columns[0]}."


def test_an_unreadable_code_is_a_problem_unless_a_rule_matches_anyway() -> None:
    volumes = [
        volume("a", codes="K297|?"),
        volume("b", codes="G301|?"),
        volume("c", codes="K297"),
        volume("d", codes="?"),
    ]
    kept, excluded = outcome(volumes, Rules(codes=("G30",), codes_column="codes"))
    assert kept == ["c"]
    reason = "Column codes holds '?', which is no ICD-10 code: correct the table."
    assert excluded == {
        "a": ("problem", reason),
        "b": ("rule", "Code G301 (rule G30) in column codes."),
        "d": ("problem", reason),
    }


def test_a_volume_without_the_column_that_others_have_is_a_problem() -> None:
    volumes = [volume("a", qc="ok"), volume("b")]
    kept, excluded = outcome(volumes, Rules(where=("qc=fail",)))
    assert kept == ["a"]
    reason = "It has no column qc, so the rule qc=fail cannot be applied: add the subject to the table."
    assert excluded == {"b": ("problem", reason)}
    _, excluded = outcome([volume("a", codes=""), volume("b")], Rules(codes=("G30",), codes_column="codes"))
    assert excluded["b"][0] == "problem"


@pytest.mark.parametrize(
    ("rule", "out", "problems"),
    [
        ("x=fail", "fail FAIL", ""),
        ("x==fail", "fail FAIL", ""),
        ("x!=fail", "45 45.0 044 4.5e1 2014-05-02 2020-01-01T10:00 -1 empty NA", ""),
        ("x=45", "45 45.0 4.5e1", ""),
        (" x = 45 ", "45 45.0 4.5e1", ""),
        ("x=", "empty NA", ""),
        ("x!=", "fail FAIL 45 45.0 044 4.5e1 2014-05-02 2020-01-01T10:00 -1", ""),
        ("x<45", "044 -1", "fail FAIL 2014-05-02 2020-01-01T10:00 empty NA"),
        ("x<=45", "45 45.0 044 4.5e1 -1", "fail FAIL 2014-05-02 2020-01-01T10:00 empty NA"),
        ("x>-1", "45 45.0 044 4.5e1", "fail FAIL 2014-05-02 2020-01-01T10:00 empty NA"),
        ("x>=45", "45 45.0 4.5e1", "fail FAIL 2014-05-02 2020-01-01T10:00 empty NA"),
        ("x>2014-05-02", "2020-01-01T10:00", "fail FAIL 45 45.0 044 4.5e1 -1 empty NA"),
    ],
)
def test_a_columns_value_leaves_volumes_out(rule: str, out: str, problems: str) -> None:
    values = "fail FAIL 45 45.0 044 4.5e1 2014-05-02 2020-01-01T10:00 -1 empty NA".split()
    volumes = [volume(value, x="" if value == "empty" else value) for value in values]
    _, excluded = outcome(volumes, Rules(where=(rule,)))
    assert [value for value in values if excluded.get(value, ("",))[0] == "rule"] == out.split()
    assert [value for value in values if excluded.get(value, ("",))[0] == "problem"] == problems.split()


def test_reasons_name_value_column_and_rule() -> None:
    volumes = [volume("a", age="44", qc="fail"), volume("b", age="", qc="ok"), volume("c", age="old", qc="")]
    _, excluded = outcome(volumes, Rules(where=("qc!=ok", "age<45")))
    assert excluded == {
        "a": ("rule", "Column qc is fail (rule qc!=ok)."),
        "b": ("problem", "Column age is empty, so the rule age<45 cannot be applied: correct the table."),
        "c": ("rule", "Column qc is empty (rule qc!=ok)."),
    }
    _, excluded = outcome(volumes, Rules(where=("age<45",)))
    assert excluded["c"][1] == "Column age holds 'old', so the rule age<45 cannot be applied: correct the table."


def test_a_field_in_several_columns_counts_where_it_has_a_value() -> None:
    volumes = [
        Candidate(name, "", Path(name), name, {"54-2.0": first, "54-3.0": second})
        for name, first, second in [("a", "1", ""), ("b", "", "2"), ("c", "1", "2"), ("d", "", "")]
    ]
    assert outcome(volumes, Rules(where=("54=2",)))[0] == ["a", "d"]
    kept, excluded = outcome(volumes, Rules(where=("54<2",)))
    assert kept == ["b"]
    assert {name: kind for name, (kind, _) in excluded.items()} == {"a": "rule", "c": "rule", "d": "problem"}
    assert outcome(volumes, Rules(where=("54-3.0=2",)))[0] == ["a", "d"]


@pytest.mark.parametrize(
    "text", ["sub-02\n3\n99\n", "\ufeffeid,why\r\n02,moved\r\n3,withdrew\r\n99,?\r\n", '"02"\n"sub-3"\n\n "99" \n']
)
def test_a_list_of_subjects_leaves_them_out_with_all_sessions(tmp_path: Path, text: str) -> None:
    path = tmp_path / "withdrawn.csv"
    path.write_text(text)
    volumes = [volume("sub-01"), volume("sub-02", "a"), volume("sub-02", "b"), volume("sub-3")]
    kept, excluded, notes = apply_rules(volumes, Rules(subjects=path))
    assert [each.subject for each in kept] == ["sub-01"]
    assert [each.source for each in excluded] == ["sub-02a.nii", "sub-02b.nii", "sub-3.nii"]
    assert {each.reason for each in excluded} == {"Its subject is on the list withdrawn.csv."}
    assert {each.kind for each in excluded} == {"rule"}
    assert notes == ["List withdrawn.csv: 2 of its 3 subjects are among the volumes'."]


def test_an_empty_list_leaves_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    path.touch()
    assert len(apply_rules([volume("a")], Rules(subjects=path))[0]) == 1


def test_notes_say_of_each_rule_how_many_it_applies_to() -> None:
    volumes = [volume("a", c="G301|I64", qc="fail"), volume("b", c="I64", qc="ok"), volume("c", c="", qc="ok")]
    _, _, notes = apply_rules(volumes, Rules(codes=("G30", "I6", "C70-C72"), codes_column="c", where=("qc=fail",)))
    assert notes == [
        "Rule G30: applies to 1 of 3 volumes.",
        "Rule I6: applies to 2 of 3 volumes.",
        "Rule C70-C72: applies to 0 of 3 volumes.",
        "Rule qc=fail: applies to 1 of 3 volumes.",
    ]


def test_without_rules_everybody_stays() -> None:
    volumes = [volume("a"), volume("b", codes="G301")]
    assert apply_rules(volumes, Rules()) == (volumes, [], [])
    assert apply_rules([], Rules(codes=("G30",)))[:2] == ([], [])


def test_needed_columns_are_those_that_rules_look_at() -> None:
    assert needed_columns(Rules()) == ()
    assert needed_columns(Rules(codes_column="x")) == ()
    assert needed_columns(Rules(codes=("G30",), where=("qc=fail", "age<45", "age>80"))) == ("41270", "qc", "age")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules(codes=("Alzheimer",)), "'Alzheimer' is not a rule for ICD-10 codes"),
        (Rules(where=("qc",)), "'qc' is not a rule on a column"),
        (Rules(where=("=fail",)), "'=fail' is not a rule on a column"),
        (Rules(where=("age<old",)), "'age<old': < compares with a number, or a date .* 'old' is neither"),
        (Rules(where=("age<",)), "'age<': < compares with a number"),
        (Rules(where=("agee<45",)), r"No volume has a column 'agee'.* there are age.*--table.path"),
        (Rules(codes=("G30",)), r"No volume has a column '41270'.* there are age, qc"),
        (Rules(subjects=Path("missing.txt")), r"list of subjects missing.txt cannot be read \(No such file"),
    ],
)
def test_rules_that_are_none_are_refused(rules: Rules, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_rules([volume("a", age="44", qc="ok")], rules)


@pytest.mark.parametrize(
    "text",
    [
        "2.0\n3.0\n",
        "eid\n2.00\n3.0\n",
        ",eid,why\n0,02,moved\n1,3,\n",
        '"why";"eid"\n"a;b";"02"\n;3\n',
        "2\tmoved away\n3\n",
        "'2'\n\"3\" ; x y\n",
    ],
)
def test_lists_as_spreadsheets_and_pandas_write_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    numbers = ("1", "02", "3") if "02" in text else ("1", "2", "3")
    kept, _, _ = apply_rules([volume(name) for name in numbers], Rules(subjects=tmp_path / "list.csv"))
    assert [each.subject for each in kept] == ["1"]


def test_a_name_with_blanks_in_a_list_is_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("3\n1 withdrew\n")
    with pytest.raises(InputError, match="'1 withdrew' in line 2: write a comma"):
        apply_rules([volume("1")], Rules(subjects=path))
    path.write_text('"Ann Doe"\n')
    assert apply_rules([volume("Ann Doe")], Rules(subjects=path))[0] == []


def test_a_rule_of_many_blanks_is_read_at_once() -> None:
    with pytest.raises(InputError, match="is not a rule on a column"):
        needed_columns(Rules(where=("a" + " b" * 200_000,)))
    assert needed_columns(Rules(where=("a" + " b" * 200_000 + "=1",)))

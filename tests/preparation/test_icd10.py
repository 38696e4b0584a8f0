"""Which codes a cell holds, however it was exported, and which of them a rule matches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decovae.errors import InputError
from decovae.preparation.icd10 import parse_rule, read_codes

CODES = st.from_regex(r"[A-Z][0-9]{2}[0-9]{0,2}", fullmatch=True)
EXPORTS: dict[str, Callable[[list[str]], str]] = {
    "bars": "|".join,
    "commas": ",".join,
    "semicolons": "; ".join,
    "lines": "\n".join,
    "blanks": " ".join,
    "JSON": json.dumps,
    "compact JSON": lambda codes: json.dumps(codes, separators=(",", ":")),
    "Python": str,
    "NumPy": lambda codes: "[" + " ".join(f"'{code}'" for code in codes) + "]",
    "bars in brackets": lambda codes: f"[{'|'.join(codes)}]",
    "PostgreSQL": lambda codes: "{" + ",".join(codes) + "}",
    "meanings": lambda codes: "|".join(f"{code[:3]}.{code[3:]} Gastritis, unspecified" for code in codes),
    "meanings in JSON": lambda codes: json.dumps([f"{code} Parkinson's disease, late" for code in codes]),
    "meanings in Python": lambda codes: str([f"{code} Parkinson's disease, late" for code in codes]),
    "meanings with commas": lambda codes: ", ".join(f"{code} Vitamin B12 deficiency, other" for code in codes),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())
@settings(deadline=None)
@given(codes=st.lists(CODES, unique=True, min_size=1))
def test_a_cell_is_read_however_it_was_exported(export: Callable[[list[str]], str], codes: list[str]) -> None:
    assert read_codes(export(codes)) == (codes, [])


@pytest.mark.parametrize(
    "cell",
    ["", "  ", "NA", "n/a", "NaN", "nan", "null", "None", "[]", "{}", "[null]", "[None, nan]", "|", ",,", '""', "['']"],
)
def test_nothing_is_no_code(cell: str) -> None:
    assert read_codes(cell) == ([], [])


@pytest.mark.parametrize(
    ("cell", "codes"),
    [
        ("g30.1", ["G301"]),
        (" G 30.1 ", ["G301"]),
        ("G30.1†|F00.1*|I64+|J11!", ["G301", "F001", "I64", "J11"]),
        ("I64X", ["I64"]),
        ("I64.-|I60-", ["I64", "I60"]),
        ("C7A.0|S72.001A|T36.0X5A", ["C7A0", "S72001A", "T360X5A"]),
        ("G301|G301|g30.1", ["G301"]),
        ("G30.1: late onset", ["G301"]),
        ('"G301|I64"', ["G301", "I64"]),
        ('["G301", null]', ["G301"]),
        ("H81.0 M\\u00e9ni\\u00e8re's disease", ["H810"]),
    ],
)
def test_codes_are_normalised(cell: str, codes: list[str]) -> None:
    assert read_codes(cell) == (codes, [])


@pytest.mark.parametrize(
    ("cell", "codes", "unreadable"),
    [
        ("G301|???", ["G301"], ["???"]),
        ("G301, ???", ["G301"], ["???"]),
        ('["G20 Parkinson\'s disease", "Stroke"]', ["G20"], ["Stroke"]),
        ("Alzheimer's disease", [], ["Alzheimer's disease"]),
        ("3310", [], ["3310"]),
        ("I60-I69", [], ["I60-I69"]),
        ("GO3", [], ["GO3"]),
        ("I6", [], ["I6"]),
        ("[[G301]]", [], ["[G301]"]),
    ],
)
def test_what_cannot_be_read_is_said_and_hides_nothing(cell: str, codes: list[str], unreadable: list[str]) -> None:
    assert read_codes(cell) == (codes, unreadable)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_cell_hides_a_code_or_nonsense_beside_it(cell: str) -> None:
    codes, unreadable = read_codes(f"{cell}|G301|no code")
    assert "G301" in codes
    assert unreadable[-1:] == ["no code"]
    assert all(re.fullmatch("[A-Z][0-9][0-9AB][0-9A-Z]{0,4}", code) for code in codes)


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        ("G30", "G30 G300 G301 G309 G30.1", "G31 G3 F30 G29"),
        ("g30.1", "G301 G3011 G301D", "G30 G300 G302"),
        ("I6", "I60 I64 I609 I699", "I59 I70 I5"),
        ("C70-C72", "C70 C700 C719 C72 C729", "C69 C699 C73"),
        ("I60.1-I60.9", "I601 I605 I609 I6099", "I60 I600 I61"),
        ("I60.0-I60.9", "I60 I600 I609", "I59 I61"),
        ("F00-G99", "F00 F000 F99 G00 G998", "E90 H00"),
        ("I60-I64.3", "I60 I600 I640 I643", "I64 I644 I65"),
        ("I64", "I64 I64X", "I63 I65"),
        ("I60-I64.9", "I64 I649 I64X", "I65"),
        ("C84.A", "C84A C84A0", "C84 C840 C84B"),
    ],
)
def test_a_rule_matches_what_lies_in_it(rule: str, inside: str, outside: str) -> None:
    parsed = parse_rule(rule)
    assert [code for code in inside.split() if not parsed.matches(code)] == []
    assert [code for code in outside.split() if parsed.matches(code)] == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("g30", "G30"),
        (" G30 .1 ", "G301"),
        ("G30.-", "G30"),
        ("G30.x", "G30"),
        ("G30*", "G30"),
        ("I64X", "I64"),
        ("F00.1†", "F001"),
        ("F001A", "F001"),
        ("G30.1D", "G301"),
        ("c70 – c72", "C70-C72"),
        ("C70-72", "C70-C72"),
        ("C70.0-C72.-", "C70.0-C72"),
    ],
)
def test_a_rule_may_be_written_in_several_ways(written: str, meant: str) -> None:
    rule, plain = parse_rule(written), parse_rule(meant)
    assert (rule.first, rule.last) == (plain.first, plain.last)


@pytest.mark.parametrize(
    "text",
    "|-|G|X|30|Alzheimer|G30,G31|G30 G31|G30 I6|G3.01|G30..1|C70-|-C72|C70-C71-C72|I60-9".split("|"),
)
def test_nonsense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"not a rule for ICD-10 codes: write .* such as G30"):
        parse_rule(text)


@pytest.mark.parametrize("text", ["C72-C70", "G00-F99", "I60.9-I60.1", "I61-I60.9"])
def test_a_range_the_wrong_way_round_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="ends before it begins"):
        parse_rule(text)


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse_rule(text)
    except InputError:
        return
    assert rule.matches(rule.first.ljust(3, "0")) or rule.first != rule.last


@settings(deadline=None)
@given(first=CODES, last=CODES, code=CODES)
def test_a_range_agrees_with_the_order_of_whole_codes(first: str, last: str, code: str) -> None:
    """Codes as intervals of their five-place subcodes: a rule matches the code whose interval lies in its own."""
    if first > last.ljust(5, "9"):
        return
    try:
        rule = parse_rule(f"{first}-{last}")
    except InputError:
        assert first[: len(last)] > last[: len(first)]
        return
    inside = first.ljust(5, "0") <= code.ljust(5, "0") and code.ljust(5, "9") <= last.ljust(5, "9")
    assert rule.matches(code) == inside

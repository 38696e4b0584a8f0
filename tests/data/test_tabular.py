"""Rows of tables as they are written, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from decovae.data.tabular import has_value, open_table
from decovae.errors import InputError


@pytest.mark.parametrize("divider", ",;\t|")
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_come_with_the_line_they_end_on(tmp_path: Path, divider: str, start: str, end: str) -> None:
    path = tmp_path / "table.csv"
    lines = ["a|b", '1|"x', 'y"', "", "|", "2", "3|4|5"]
    path.write_bytes((start + end.join(lines).replace("|", divider)).encode())
    with open_table(path) as (names, rows):
        assert names == ["a", "b"]
        whole = [(3, ["1", f"x{end}y"])]
        assert list(rows) == [
            *([(2, ["1", '"x']), (3, ['y"'])] if divider == "\t" else whole),  # between tabs, a line is a row
            (6, ["2"]),
            (7, ["3", "4", "5"]),
        ]


def test_between_tabs_quotes_that_come_alone_are_part_of_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv"
    path.write_text('a\tb\n1\t"left" handed\n"2"\t"3\t4"\n5\t5\'10"\n"6\t7\n', "utf-8")
    with open_table(path) as (_, rows):
        assert [cells for _, cells in rows] == [["1", '"left" handed'], ["2", "3\t4"], ["5", "5'10\""], ['"6', "7"]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'a,b\n1,2\n3,"4\n5,6\n', "unexpected end of data, in the row that begins in line 3"),
        (b'a,b\n1,2\n3,"4" 5\n5,6\n', "in the row that begins in line 3"),
        (b"a\tb\n" + b"1\t2\n" * 5000 + b"3\t\xff\n", "it holds other bytes in line 5002"),
    ],
)
def test_the_line_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with (
        pytest.raises(InputError, match=rf"table\.csv cannot be read as CSV in UTF-8: .*{expected}\.$"),
        open_table(tmp_path / "table.csv") as (_, rows),
    ):
        list(rows)


@pytest.mark.parametrize("cell", ["", " ", "NA", "n/a", "NaN", "null", "<NA>"])
def test_what_stands_for_nothing_is_no_value(cell: str) -> None:
    assert not has_value(cell)
    assert has_value("0")


def test_an_empty_table_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "table.csv").touch()
    with open_table(tmp_path / "table.csv") as (names, rows):
        assert (names, list(rows)) == ([], [])

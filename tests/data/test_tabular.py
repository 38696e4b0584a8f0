"""Rows of tables as they are written, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from decovae.data.tabular import open_table


@pytest.mark.parametrize("divider", ",;\t|")
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_come_with_the_line_they_end_on(tmp_path: Path, divider: str, start: str, end: str) -> None:
    path = tmp_path / "table.csv"
    lines = ["a|b", '1|"x', 'y"', "", "|", "2", "3|4|5"]
    path.write_bytes((start + end.join(lines).replace("|", divider)).encode())
    with open_table(path) as (names, rows):
        assert names == ["a", "b"]
        assert list(rows) == [(3, ["1", f"x{end}y"]), (6, ["2"]), (7, ["3", "4", "5"])]


def test_an_empty_table_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "table.csv").touch()
    with open_table(tmp_path / "table.csv") as (names, rows):
        assert (names, list(rows)) == ([], [])

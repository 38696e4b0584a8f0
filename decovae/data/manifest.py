"""Tables in text files: manifests of volumes, and what BIDS keeps beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from decovae.data.tabular import has_value, open_table
from decovae.errors import InputError

MANIFESTS = (".csv", ".tsv")
"""Suffixes of files that are taken for manifests."""
RESERVED = ("path", "subject", "session", "mask")
"""Columns of a manifest with a meaning of their own; all others are carried along as they are."""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        line: the number of its line in the file.
        cells: its cells by column, without the blanks around them.
        surplus: of cells that are not empty behind the last column, what is wrong, to follow "the line …"; else empty.
    """

    line: int
    cells: Mapping[str, str]
    surplus: str = ""

    def value(self, column: str) -> str:
        """Its cell of a column; empty where there is none, and for `NA`, `n/a` and the like."""
        cell = self.cells.get(column, "")
        return cell if has_value(cell) else ""

    def others(self, *known: str) -> dict[str, str]:
        """Its cells in columns that have a name, but not one of those."""
        return {name: value for name, value in self.cells.items() if name and name not in known}


def read_table(path: Path, column: str) -> list[Row]:
    """The rows of a table that has `column`: all but those that are empty. A row that ends early has empty cells.

    Raises:
        InputError: it cannot be read, is not UTF-8 or no table, has no column of that name, or two of one name, or
            a row has more cells than there are columns.
    """
    rows = read_rows(path, column)
    for row in rows:
        if row.surplus:
            raise InputError(f"The table {path} {row.surplus} in line {row.line}: correct the line.")
    return rows


def read_rows(path: Path, column: str) -> list[Row]:
    """As `read_table`, but rows with more cells than there are columns are returned: see their `surplus`."""
    with open_table(path) as (columns, lines):
        if column not in columns:
            names = ", ".join(columns) or "none"
            raise InputError(f"The table {path} has no column '{column}'; it has {names}.")
        twice = next((name for name in columns if name and columns.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"The table {path} has two columns named '{twice}': rename one of them.")
        return [_row(line, columns, cells) for line, cells in lines]


def _row(line: int, columns: Sequence[str], cells: Sequence[str]) -> Row:
    behind = any(cell.strip() for cell in cells[len(columns) :])
    surplus = f"has {len(cells)} cells for {len(columns)} columns" if behind else ""
    named = {name: cells[place].strip() if place < len(cells) else "" for place, name in enumerate(columns)}
    return Row(line, named, surplus)

"""Tables in text files: manifests of volumes, and what BIDS keeps beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from decovae.data.tabular import open_table
from decovae.errors import InputError

MANIFESTS = (".csv", ".tsv")
"""Suffixes of files that are taken for manifests."""
RESERVED = ("path", "subject", "session", "mask")
"""Columns of a manifest with a meaning of their own; all others are carried along as they are."""


class Row(NamedTuple):
    """A row: the number of its line in the file, and its cells by column, without the blanks around them."""

    line: int
    cells: Mapping[str, str]

    def others(self, *known: str) -> dict[str, str]:
        """Its cells in columns that have a name, but not one of those."""
        return {name: value for name, value in self.cells.items() if name and name not in known}


def read_table(path: Path, column: str) -> list[Row]:
    """The rows of a table that has `column`: all but those that are empty. A row that ends early has empty cells.

    Raises:
        InputError: it cannot be read, is not UTF-8 or no table, has no column of that name, or two of one name.
    """
    with open_table(path) as (columns, lines):
        if column not in columns:
            names = ", ".join(columns) or "none"
            raise InputError(f"The table {path} has no column '{column}'; it has {names}.")
        twice = next((name for name in columns if name and columns.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"The table {path} has two columns named '{twice}': rename one of them.")
        return [
            Row(line, {name: cells[place].strip() if place < len(cells) else "" for place, name in enumerate(columns)})
            for line, cells in lines
        ]

"""Tables as text, row by row, with commas, tabs, semicolons or bars between cells, as programs and Excel write them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from decovae.errors import InputError

_DELIMITERS = ",\t;|"
Line = tuple[int, list[str]]
"""The number of the line on which a row ends, from 1, and the row's cells as they are."""


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[Line]]]:
    """The names of a table's columns, and its rows as they are read: a table may be larger than memory.

    Text is UTF-8, with or without a byte-order mark. What divides the first line into most names divides all lines.
    Empty rows are passed over; a row may have fewer or more cells than there are names.

    Raises:
        InputError: the file cannot be opened, is no text, or no table; also while rows are read.
    """
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        try:
            first = file.readline()
            reader = csv.reader(chain([first], file), delimiter=_delimiter(first), strict=True)
            names = [name.strip() for name in next(reader, [])]
        except (OSError, UnicodeError, csv.Error) as error:
            raise _unreadable(path, error) from error

        def rows() -> Iterator[Line]:
            try:
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        yield reader.line_num, cells
            except (OSError, UnicodeError, csv.Error) as error:
                raise _unreadable(path, error) from error

        yield names, rows()


def _delimiter(line: str) -> str:
    return max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader([line], delimiter=delimiter), [])))


def _unreadable(path: Path, error: OSError | UnicodeError | csv.Error) -> InputError:
    why = "it holds other bytes" if isinstance(error, UnicodeError) else error
    if isinstance(error, OSError):
        why = error.strerror or error
    return InputError(f"The table {path} cannot be read as CSV in UTF-8: {why}.")

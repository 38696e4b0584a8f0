"""Tables as text, row by row, with commas, tabs, semicolons or bars between cells, as programs and Excel write them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from decovae.errors import InputError

NO_VALUE = frozenset({"", "na", "n/a", "nan", "<na>", "null"})
"""What tables write where there is nothing, in lower case."""

_DELIMITERS = ",\t;|"
Line = tuple[int, list[str]]
"""The number of the line on which a row ends, from 1, and the row's cells as they are."""


def has_value(cell: str) -> bool:
    """Whether there is anything in a cell."""
    return cell.strip().lower() not in NO_VALUE


@contextmanager
def open_table(path: Path) -> Iterator[tuple[list[str], Iterator[Line]]]:
    """The names of a table's columns, and its rows as they are read: a table may be larger than memory.

    Text is UTF-8, with or without a byte-order mark. What divides the first line into most names divides all lines.
    Empty rows are passed over; a row may have fewer or more cells than there are names. Between tabs, quotes need not
    mean anything, as BIDS has it: a line is a row, and where they do not come in pairs they are part of the cells.

    Raises:
        InputError: the file cannot be opened, is no text, or no table; also while rows are read.
    """
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error, 0) from error
    with file:
        rows = _rows(path, file)
        _, names = next(rows, (0, []))
        yield [name.strip() for name in names], ((line, row) for line, row in rows if any(map(str.strip, row)))


def _rows(path: Path, file: TextIO) -> Iterator[Line]:
    ended = 0
    try:
        first = file.readline()
        delimiter, lines = _delimiter(first), chain([first], file)
        for ended, cells in _between_tabs(lines) if delimiter == "\t" else _quoted(lines, delimiter):
            yield ended, cells
    except (OSError, UnicodeError, csv.Error) as error:
        raise _unreadable(path, error, ended) from error


def _quoted(lines: Iterable[str], delimiter: str) -> Iterator[Line]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    for cells in reader:
        yield reader.line_num, cells


def _between_tabs(lines: Iterable[str]) -> Iterator[Line]:
    for number, line in enumerate(lines, 1):
        yield number, _divided(line)


def _divided(line: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter="\t", strict=True), [])
    except csv.Error:
        return line.rstrip("\r\n").split("\t")


def _delimiter(line: str) -> str:
    return max(_DELIMITERS, key=lambda delimiter: len(next(csv.reader([line], delimiter=delimiter), [])))


def _unreadable(path: Path, error: OSError | UnicodeError | csv.Error, ended: int) -> InputError:
    """What is wrong with a table whose last good row ended in a line."""
    if isinstance(error, OSError):
        why = str(error.strerror or error)
    elif isinstance(error, UnicodeError):
        why = f"it holds other bytes in line {_line_of_other_bytes(path)}"
    else:
        why = f"{error}, in the row that begins in line {ended + 1}"
    return InputError(f"The table {path} cannot be read as CSV in UTF-8: {why}.")


def _line_of_other_bytes(path: Path) -> int:
    """Text is decoded in blocks: which line a block broke off in takes another look."""
    with path.open("rb") as file:
        lines = enumerate(file, 1)
        return next((number for number, line in lines if line.decode("utf-8", "ignore").encode() != line), 1)

"""Columns of tables: which one a user means, and which has the subjects."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from itertools import islice

KEYS = ("subject", "eid", "participant_id", "participant.eid", "f.eid", "n_eid")
"""Names of the column that says whose row it is: ours, UK Biobank's, BIDS', and those of UK Biobank's tools."""

_FIELD = re.compile(r"(?:participant\.)?(?:p|f\.|[a-z]_)?([0-9]+)(?:[-._][ia]?[0-9]+)*", re.IGNORECASE)
_ANY_OF_FIELD = re.compile(r"(?:participant\.)?(?:p|f\.|[a-z]_)?([0-9]+)", re.IGNORECASE)


def columns_named(name: str, columns: Iterable[str]) -> list[str]:
    """The columns that a name stands for: the one of that name, or all those of a field of UK Biobank, in their order.

    The field 41270 is found as `p41270`, `41270-0.0` to `41270-0.N`, `f.41270.0.0`, `p41270_i0_a3`, `n_41270_0_0`: all
    of them together.
    """
    columns = list(columns)
    if name in columns and not name.isdigit():
        return [name]
    field = _ANY_OF_FIELD.fullmatch(name)
    if field is None:
        return []
    fields = ((column, _FIELD.fullmatch(column)) for column in columns)
    return [column for column, found in fields if found is not None and found[1] == field[1]]


def choices(columns: Collection[str], *, near: str) -> str:
    """What there is instead of a column that is not there, for an error: the most alike, or the first few."""
    shown = get_close_matches(near, columns, n=3) or list(islice(columns, 8))
    rest = len(columns) - len(shown)
    return ", ".join(shown) + (f" and {rest} others" if rest else "") if shown else "no columns"

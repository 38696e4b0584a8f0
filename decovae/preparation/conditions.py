"""Rules on a column's value, such as ``qc=fail`` or ``age<45``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decovae.data.tabular import has_value
from decovae.errors import InputError

_COMPARISON = re.compile(r"!=|<=|>=|==|=|<|>")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DATE = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})(?:[T ].*)?")
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class NotComparable(Exception):
    """A value that is not there, or of another kind than the rule's; the message completes "the column …"."""


@dataclass(frozen=True)
class Condition:
    """A column's name, how its value is compared, and with what."""

    text: str
    column: str
    comparison: str
    value: str

    def holding(self, values: Sequence[str]) -> str | None:
        """The first of a volume's values for which the condition holds, or None.

        Numbers are compared as numbers, dates (2014-05-02) as dates, everything else, in = and != alone, as text
        without regard to case. Where several columns are meant, those without a value do not count, unless all are.

        Raises:
            NotComparable: the condition is an order, and there is no value, or one that has no order with the rule's.
        """
        present = [value for value in values if has_value(value)]
        if self.comparison not in _ORDERS:
            wanted = self.comparison == "="
            return next((value for value in present or [""] if _equal(value, self.value) == wanted), None)
        if not present:
            raise NotComparable("is empty")
        odd = None
        for value in present:
            left, right = _ordered(value), _ordered(self.value)
            if type(left) is not type(right):
                odd = value
            elif _ORDERS[self.comparison](left, right):
                return value
        if odd is not None:
            raise NotComparable(f"holds {odd!r}")
        return None


def parse_condition(text: str) -> Condition:
    """The condition that a user wrote: a column, one of = != < <= > >=, and a value, which may be empty for = and !=.

    Raises:
        InputError: it is none, or asks for an order with what is neither a number nor a date.
    """
    found = _COMPARISON.search(text)
    column = text[: found.start()].strip() if found else ""
    if found is None or not column:
        raise InputError(f"{text!r} is not a rule on a column: write it as 'qc=fail', 'sex!=1' or 'age<45', in quotes.")
    comparison, value = "=" if found[0] == "==" else found[0], text[found.end() :].strip()
    if comparison in _ORDERS and _ordered(value) is None:
        raise InputError(
            f"{text!r}: {comparison} compares with a number, or a date such as 2014-05-02, and {value!r} is neither."
        )
    return Condition(text.strip(), column, comparison, value)


def _equal(value: str, wanted: str) -> bool:
    if _NUMBER.fullmatch(value) and _NUMBER.fullmatch(wanted):
        return float(value) == float(wanted)
    if not has_value(wanted):
        return not has_value(value)
    return value.casefold() == wanted.casefold()


def _ordered(value: str) -> float | str | None:
    if _NUMBER.fullmatch(value):
        return float(value)
    date = _DATE.fullmatch(value)
    return date[1] if date else None

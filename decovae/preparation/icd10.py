"""ICD-10 codes: those in a cell of a table, and rules such as ``G30``, ``I6`` or ``C70-C72`` that they may match."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import ascii_uppercase

from decovae.data.tabular import NO_VALUE
from decovae.errors import InputError

_NO_CODE = NO_VALUE | {"none"}
_CODE = r"[A-Za-z][0-9][0-9ABab](?:\.?[0-9A-Za-z]{1,4})?"
_MARK = r"(?:[†‡*+!]|\.?-|\.)?"
"""Behind a code: dagger and asterisk, which say that two codes belong together; a hyphen for all of its subcodes."""
_MARKED = re.compile(rf"({_CODE}){_MARK}")
_BLANKS_WITHIN = re.compile(rf"([A-Za-z][0-9]{{2}}\.?[0-9]{{0,2}}[XDAxda]?){_MARK}")
_BETWEEN = re.compile(rf"""[|;\r\n]|["']\s*,|,(?=\s*["']?{_CODE}{_MARK}(?:["':,\s]|$))""")
_BRACKETS = {"[": "]", "(": ")", "{": "}"}

_BOUND = re.compile(r"([A-Z][0-9](?:[0-9AB][0-9A-Z]{0,4}?)?)(?:[X†‡*+!]|(?<=[0-9]{3})[DA])?")
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"))


@dataclass(frozen=True)
class CodeRule:
    """All codes from one to another, each standing for whatever begins with it: ``G30`` for G30, G30.0, G30.1 …

    Attributes:
        text: the rule as it was given.
        first, last: where the range begins and ends, upper case and without dots; equal for a single code or prefix.
    """

    text: str
    first: str
    last: str

    def matches(self, code: str) -> bool:
        """Whether all that a code stands for lies in the range.

        A code that is shorter than a bound stands for all of its subcodes: I60 lies in I60.0-I60.9, but not in
        I60.1-I60.9. Letters at the end do not keep a code out, be it X where there is no subcode, or D and A for dagger
        and asterisk.
        """
        code = code.strip().upper().replace(".", "")
        return any(
            self.first <= form.ljust(len(self.first), "0")[: len(self.first)]
            and form.ljust(len(self.last), "9")[: len(self.last)] <= self.last
            for form in (code, code[:3] + code[3:].rstrip(ascii_uppercase))
        )


def parse_rule(text: str) -> CodeRule:
    """The rule that a user wrote: a code or the beginning of one (``G30``, ``G30.1``, ``I6``), or a range of them
    (``C70-C72``, ``F00-G99``, ``I60.1-I60.9``, ``C70-72``), in any case, with or without dots.

    Raises:
        InputError: it is neither, or the range is the wrong way round.
    """
    compact = re.sub(r"\s*([-.])\s*", r"\1", text.strip().translate(_DASHES).upper())
    first = last = _bound(compact)
    if first is None:
        begin, _, end = compact.partition("-")
        same_letter = end.isdigit() and len(end) == len(begin) - 1
        first, last = _bound(begin), _bound(begin[0] + end if same_letter else end)
    if first is None or last is None:
        raise InputError(
            f"{text!r} is not a rule for ICD-10 codes: write the beginning of a code, such as G30, G30.1 or I6, or a "
            "range, such as C70-C72; several rules with blanks between them."
        )
    if first[: len(last)] > last[: len(first)]:
        raise InputError(f"The range of ICD-10 codes {text!r} ends before it begins: write it the other way round.")
    return CodeRule(text.strip(), first, last)


def _bound(text: str) -> str | None:
    """A code or the beginning of one without its dot and what may stand behind it; None if it is no such thing."""
    text = text.removesuffix(".-").removesuffix(".")
    match = _BOUND.fullmatch(text[:3] + text[3:].replace(".", "", 1))
    return match[1] if match else None


def read_codes(cell: str) -> tuple[list[str], list[str]]:
    """The ICD-10 codes in a cell, and the parts of it that cannot be read as codes.

    Understood are codes between ``|``, ``;``, commas or line ends, as UK Biobank's field 41270 comes (``G301|I64``),
    lists as JSON, Python and NumPy print them (``["G301","I64"]``), and codes with their meaning behind them
    (``G30.1 Alzheimer's disease with late onset``). ``NA``, ``NaN``, ``null``, ``[]`` and the like are no codes.

    Returns:
        Codes in upper case, without dots, each once, in the order of the cell; and the unreadable parts as they are.
    """
    text = cell.strip()
    if len(text) > 1 and _BRACKETS.get(text[0]) == text[-1]:
        text = text[1:-1]
    codes: dict[str, None] = {}
    unreadable = []
    for part in _BETWEEN.split(text):
        whole = _leading_codes(part)
        for piece in [part] if whole is not None else part.split(","):
            found = _leading_codes(piece)
            if found is None:
                unreadable.append(piece.strip(" \t\"'"))
            else:
                codes.update(dict.fromkeys(found))
    return list(codes), unreadable


def _leading_codes(part: str) -> list[str] | None:
    """The codes that a part begins with, before the meaning if there is one; None if it begins with anything else."""
    text = part.strip(" \t\"'")
    if text.lower() in _NO_CODE:
        return []
    if match := _BLANKS_WITHIN.fullmatch(re.sub(r"\s", "", text)):
        return [_normal(match[1])]
    codes = []
    for word in text.split():
        match = _MARKED.fullmatch(word.strip("\"'").removesuffix(":"))
        if match is None:
            break
        codes.append(_normal(match[1]))
    return codes or None


def _normal(code: str) -> str:
    code = code.upper().replace(".", "")
    return code[:3] + code[3:].removesuffix("X")

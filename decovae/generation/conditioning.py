"""From columns of a manifest to what conditions a flow, and classifier-free guidance by it.

A row of conditions is a float32 tensor (K,), an entry for each condition: (number − mean) / std of a scalar, the place
among its values of a category, NaN for whatever is absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from decovae.errors import InputError
from decovae.models.conditions import CategoricalCondition, Condition, ScalarCondition, condition_from_dict

__all__ = [
    "CategoricalCondition",
    "Condition",
    "ScalarCondition",
    "condition_from_dict",
    "drop_conditions",
    "encode_conditions",
    "fit_conditions",
    "guided_velocity",
    "parse_condition_options",
]

MOST_CATEGORIES = 32


def fit_conditions(
    names: Sequence[str], rows: Sequence[Mapping[str, str]], training: Sequence[int] | None = None
) -> tuple[Condition, ...]:
    """The conditions in these columns: scalars where at least half of the values are numbers, categories elsewhere.

    What is a code, not a quantity, but written as a number, such as sex 0/1 or site 11025, is named ``sex:category``;
    ``age:number`` makes any other value an error. The condition is called by what stands before the colon. A volume may
    have an empty value, which `encode_conditions` takes for absent.

    Args:
        names: of the columns, each with ``:category`` or ``:number`` behind it or neither, in the order of the result.
        rows: for each volume its columns; a column ``subject``, where there is one, names it in errors.
        training: which rows are trained on: mean and standard deviation of scalars are theirs. All by default.
            Categories are those of all rows, so that the volumes that are held out can be encoded too.

    Raises:
        InputError: a name has another word behind its colon; a column is missing, named twice, empty in all rows that
            are trained on, or has one value only there; in any row, it has a value that is no finite number among
            numbers; or it has more than 32 categories.
        ValueError: there are no rows to train on.
    """
    training = range(len(rows)) if training is None else training
    if not training:
        raise ValueError("conditions are fitted on at least one row")
    kinds: dict[str, str] = {}
    for text in names:
        name, kind = _name_and_kind(text)
        if name in kinds:
            raise InputError(f"column {name!r} is named twice among the conditions; name it once.")
        kinds[name] = kind
    return tuple(_fit(name, kind, rows, training) for name, kind in kinds.items())


def _name_and_kind(text: str) -> tuple[str, str]:
    """What stands before the last colon and behind it; the kind is empty where there is none."""
    if ":" not in text:
        return text, ""
    name, _, kind = text.rpartition(":")
    if kind not in ("number", "category"):
        raise InputError(f"condition {text!r}: no such kind as {kind!r}; write {name}:number or {name}:category.")
    return name, kind


def _fit(name: str, kind: str, rows: Sequence[Mapping[str, str]], training: Sequence[int]) -> Condition:
    values = [_value(name, row) for row in rows]
    present = [value for value in values if value]
    seen = [values[place] for place in training if values[place]]
    if not seen:
        raise InputError(
            f"column {name!r} is empty for all volumes to train on; fill it in, or leave it out of the conditions."
        )
    if len(set(seen)) == 1:
        raise _only(name, repr(seen[0]))
    numbers = [_number(value) for value in present]
    if kind == "category" or (not kind and 2 * numbers.count(None) > len(numbers)):
        categories = tuple(sorted(set(present)))
        if len(categories) > MOST_CATEGORIES:
            raise InputError(
                f"column {name!r} has {len(categories)} different values, and a category at most {MOST_CATEGORIES}; "
                "group them, or give numbers."
            )
        return CategoricalCondition(name, categories)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value and _number(value) is None:
            raise _not_a_number(_subject(row) or f"row {place + 1} of the volumes: ", name, value)
    found = [float(value) for value in seen]
    mean = math.fsum(found) / len(found)
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in found) / len(found))
    if std == 0:
        raise _only(name, f"{found[0]:g}")
    return ScalarCondition(name, mean, std)


def _value(name: str, row: Mapping[str, str]) -> str:
    if name not in row:
        there = ", ".join(column for column in row if column != "subject") or "none"
        raise InputError(f"column {name!r}: the manifest has no such column to condition on; there are: {there}.")
    return row[name].strip()


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _subject(row: Mapping[str, str]) -> str:
    """The beginning of a sentence about a row; empty if it does not say whose it is."""
    return f"subject {row['subject']}: " if row.get("subject") else ""


def _only(name: str, value: str) -> InputError:
    return InputError(
        f"column {name!r}: {value} is the only value of the volumes to train on; leave it out of the conditions."
    )


def _not_a_number(where: str, name: str, value: str) -> InputError:
    return InputError(
        f"{where}column {name!r} has {value!r} among numbers; give a number, leave it empty, or train with "
        f"{name}:category."
    )


def encode_conditions(conditions: Sequence[Condition], row: Mapping[str, str]) -> Tensor:
    """A volume's columns as a row of conditions, (K,) float32; a column that is missing or empty is absent, NaN.

    Args:
        conditions: what `fit_conditions` gave.
        row: the volume's columns; ``subject``, where it is there, names the volume in errors.

    Raises:
        InputError: a value that is no finite number where one belongs, or none of the categories.
    """
    entries = []
    for condition in conditions:
        value = row.get(condition.name, "").strip()
        entry = _entry(condition, value) if value else math.nan
        if entry is None:
            if isinstance(condition, ScalarCondition):
                raise _not_a_number(_subject(row), condition.name, value)
            raise InputError(
                f"{_subject(row)}column {condition.name!r} has {value!r}, not {_choice(condition.values)}; give one of "
                "these, or leave it empty."
            )
        entries.append(entry)
    return torch.tensor(entries, dtype=torch.float32)


def _entry(condition: Condition, value: str) -> float | None:
    """A value as the flow sees it, None if the condition does not take it."""
    if isinstance(condition, CategoricalCondition):
        return condition.values.index(value) if value in condition.values else None
    number = _number(value)
    return None if number is None else (number - condition.mean) / condition.std


def _choice(values: Iterable[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def parse_condition_options(options: Sequence[str], conditions: Sequence[Condition]) -> dict[str, str]:
    """What `encode_conditions` takes, from options such as ``age=63`` and ``sex=F``.

    Raises:
        InputError: an option is not ``name=value``, names a condition twice or one that the flow does not have, or its
            value is none that the condition takes.
    """
    known = {condition.name: condition for condition in conditions}
    row: dict[str, str] = {}
    for option in options:
        name, equals, value = (part.strip() for part in option.partition("="))
        if not (name and equals and value):
            raise InputError(f"--condition {option}: write NAME=VALUE, such as {next(iter(known), 'age')}=VALUE.")
        if not known:
            raise InputError(f"--condition {option}: this flow was trained without conditions; leave the option out.")
        if name not in known:
            raise InputError(f"--condition {option}: this flow has no condition {name!r}; choose {_choice(known)}.")
        if name in row:
            raise InputError(f"--condition {option}: {name!r} is given twice; give it once.")
        condition = known[name]
        if _entry(condition, value) is None:
            advice = (
                f"not a finite number; give one, such as {condition.mean:.4g}"
                if isinstance(condition, ScalarCondition)
                else f"no such value; choose {_choice(condition.values)}"
            )
            raise InputError(f"--condition {name}={value}: {advice}.")
        row[name] = value
    return row


def drop_conditions(batch: Tensor, probability: float, draws: Tensor) -> Tensor:
    """A copy of the rows (N, K) in which conditions are absent, NaN, at random, for classifier-free guidance.

    A whole row with this probability, and in the rows that are left each entry with the same one, independently: so the
    flow learns what it is without conditions, and with every subset of them, as a sample may be asked for.

    Args:
        batch: encoded conditions.
        probability: of each.
        draws: (N, 1 + K) numbers drawn evenly from [0, 1) on the device of the batch: a row's, then its entries'.
    """
    hits = draws < probability
    return batch.masked_fill(hits[:, :1] | hits[:, 1:], math.nan)


def guided_velocity(
    network: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    t: Tensor,
    condition: Tensor | None,
    guidance: float = 1.0,
) -> Tensor:
    """v(absent) + guidance · (v(condition) − v(absent)), the shape and dtype of what the network returns.

    Both velocities come from one call with a batch twice as large; with guidance 0 or 1, or without a condition, only
    one is needed.

    Args:
        network: (x, t, condition) → velocity.
        x: (N, C, d, h, w).
        t: (N,) or a scalar tensor.
        condition: (N, K), or None for none.
        guidance: 1 follows the condition as trained, more exaggerates it, 0 ignores it.
    """
    if condition is None or guidance == 0:
        return network(x, t, None)
    if guidance == 1:
        return network(x, t, condition)
    times = t if t.ndim == 0 else torch.cat((t, t))
    both = torch.cat((torch.full_like(condition, math.nan), condition))
    absent, present = network(torch.cat((x, x)), times, both).chunk(2)
    return absent + guidance * (present - absent)

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


def fit_conditions(names: Sequence[str], rows: Sequence[Mapping[str, str]]) -> tuple[Condition, ...]:
    """The conditions in these columns: scalars where at least half of the values are numbers, categories elsewhere.

    Args:
        names: of the columns, in the order of the result.
        rows: for each training volume its columns; a column ``subject``, where there is one, names it in errors.

    Raises:
        InputError: a column is missing, named twice, has an empty value or one that is no finite number among numbers,
            has one value only, or more than 32 categories.
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("conditions are fitted on at least one row")
    repeated = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if repeated is not None:
        raise InputError(f"column {repeated!r} is named twice among the conditions; name it once.")
    return tuple(_fit(name, rows) for name in names)


def _fit(name: str, rows: Sequence[Mapping[str, str]]) -> Condition:
    values = [_present(name, place, row) for place, row in enumerate(rows)]
    numbers = [_number(value) for value in values]
    found = [number for number in numbers if number is not None]
    if len(set(values)) == 1:
        raise InputError(f"column {name!r}: all volumes have the value {values[0]!r}; leave it out of the conditions.")
    if 2 * len(found) < len(values):
        categories = tuple(sorted(set(values)))
        if len(categories) > MOST_CATEGORIES:
            raise InputError(
                f"column {name!r} has {len(categories)} different values, and a category at most {MOST_CATEGORIES}; "
                "group them, or give numbers."
            )
        return CategoricalCondition(name, categories)
    if len(found) < len(values):
        place = numbers.index(None)
        raise InputError(
            f"{_row(place, rows[place])}: column {name!r} has {values[place]!r} among numbers; "
            "give a number, or leave the volume or the column out."
        )
    mean = math.fsum(found) / len(found)
    std = math.sqrt(math.fsum((number - mean) ** 2 for number in found) / len(found))
    if std == 0:
        raise InputError(f"column {name!r}: all volumes have the value {found[0]:g}; leave it out of the conditions.")
    return ScalarCondition(name, mean, std)


def _present(name: str, place: int, row: Mapping[str, str]) -> str:
    if name not in row:
        there = ", ".join(column for column in row if column != "subject") or "none"
        raise InputError(f"column {name!r}: the manifest has no such column to condition on; there are: {there}.")
    value = row[name].strip()
    if not value:
        raise InputError(
            f"{_row(place, row)}: column {name!r} is empty; fill it in, or leave the volume or the column out."
        )
    return value


def _row(place: int, row: Mapping[str, str]) -> str:
    return f"subject {row['subject']}" if row.get("subject") else f"row {place + 1} of the volumes"


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def encode_conditions(conditions: Sequence[Condition], row: Mapping[str, str]) -> Tensor:
    """A volume's columns as a row of conditions, (K,) float32; a column that is missing or empty is absent, NaN.

    Raises:
        InputError: a value that is no finite number where one belongs, or none of the categories.
    """
    entries = [_entry(condition, row.get(condition.name, "").strip()) for condition in conditions]
    return torch.tensor(entries, dtype=torch.float32)


def _entry(condition: Condition, value: str) -> float:
    if not value:
        return math.nan
    if isinstance(condition, CategoricalCondition):
        if value not in condition.values:
            raise InputError(f"{condition.name}={value}: no such value; choose {_choice(condition.values)}.")
        return condition.values.index(value)
    number = _number(value)
    if number is None:
        raise InputError(f"{condition.name}={value}: not a finite number; give one, such as {condition.mean:.4g}.")
    return (number - condition.mean) / condition.std


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
        try:
            _entry(known[name], value)
        except InputError as error:
            raise InputError(f"--condition {error}") from None
        row[name] = value
    return row


def drop_conditions(batch: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """A copy of the rows (N, K) in which each is all NaN with this probability, for classifier-free guidance.

    The draws are made on the generator's device (without one, on the CPU), so the same generator drops the same rows
    wherever the batch is.
    """
    where = torch.device("cpu") if generator is None else generator.device
    dropped = torch.rand(batch.shape[0], 1, generator=generator, device=where) < probability
    return batch.masked_fill(dropped.to(batch.device), math.nan)


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

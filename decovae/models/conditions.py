"""What a flow can be conditioned on: numbers and categories of a volume, such as age and sex."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class ScalarCondition:
    """A number, which networks see as (number − mean) / std.

    Attributes:
        name: the manifest's column.
        mean, std: over the volumes that it was fitted on; std is positive.
    """

    name: str
    mean: float
    std: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `condition_from_dict` reads them."""
        return {"kind": "scalar", **asdict(self)}


@dataclass(frozen=True)
class CategoricalCondition:
    """One of several values, which networks see as its place among them.

    Attributes:
        name: the manifest's column.
        values: what it may be, in the order of their embeddings.
    """

    name: str
    values: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `condition_from_dict` reads them."""
        return {"kind": "categorical", "name": self.name, "values": list(self.values)}


Condition: TypeAlias = ScalarCondition | CategoricalCondition


def condition_from_dict(values: dict[str, Any]) -> Condition:
    """The condition whose `as_dict` this is.

    Raises:
        ValueError: it is none's.
    """
    try:
        if values["kind"] == "scalar":
            return ScalarCondition(str(values["name"]), float(values["mean"]), float(values["std"]))
        if values["kind"] == "categorical":
            return CategoricalCondition(str(values["name"]), tuple(str(value) for value in values["values"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a description of a condition: {values!r}") from error
    raise ValueError(f"not a kind of condition: {values['kind']!r}")

"""Who trains, who validates, who tests: as a column says, or by fractions of the subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from decovae.data.splits import COLUMN, Split, declared_splits, key_of, ranked_subjects
from decovae.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which share of the subjects, with all their sessions, is held out; a column `split` says it instead if there is
    one."""

    validation: float = 0.0
    """Share of the subjects that training is validated on."""
    test: float = 0.0
    """Share of the subjects that training never sees."""
    seed: int = 0
    """Seed of who they are."""


def assign_splits(rows: Sequence[tuple[str, Mapping[str, str]]], splits: Splits) -> list[Split] | None:
    """The split of each volume, all volumes of a subject in one.

    By fractions, subjects are taken in the order of `decovae.data.splits.ranked_subjects`: the first for validation, as
    training does by itself with the same seed, the next for testing. How many is the largest remainder's: as exact as
    whole subjects can be, with at least one wherever a share is asked for, and one for training.

    Args:
        rows: a volume's subject, and its columns.

    Returns:
        None where neither a column nor a fraction says anything.

    Raises:
        InputError: shares that leave nothing to train on, too few subjects, both a column and fractions, or a column
            that contradicts itself.
    """
    shares = {name: Fraction(str(share)) for name, share in _asked(splits).items()}
    declared = declared_splits(rows)
    if declared is not None:
        if shares:
            raise InputError(
                f"The volumes have a column {COLUMN!r}, and --split.{next(iter(shares))} asks for another split; leave "
                "one of the two out."
            )
        return declared
    if not shares or not rows:
        return None
    subjects = ranked_subjects((subject for subject, _ in rows), seed=splits.seed)
    counts = _counts(len(subjects), shares)
    held_out = counts.get("validation", 0)
    tested = held_out + counts.get("test", 0)
    of_subject: dict[str, Split] = {
        subject: "validation" if rank < held_out else "test" if rank < tested else "train"
        for rank, subject in enumerate(subjects)
    }
    return [of_subject[key_of(subject)] for subject, _ in rows]


def _asked(splits: Splits) -> dict[str, float]:
    shares = {"validation": splits.validation, "test": splits.test}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"--split.{name} {share:g}: a share of the subjects is at least 0 and below 1.")
    if sum(map(Fraction, map(str, shares.values()))) >= 1:
        raise InputError(
            f"--split.validation {splits.validation:g} and --split.test {splits.test:g} leave nobody to train on; "
            "together they have to be below 1."
        )
    return {name: share for name, share in shares.items() if share}


def _counts(subjects: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    parts = {"train": 1 - sum(shares.values()), **shares}
    if subjects < len(parts):
        raise InputError(
            f"{subjects} subjects cannot be split into {len(parts)} parts ({', '.join(parts)}), each with at least "
            "one; give more volumes, or leave out --split.validation or --split.test."
        )
    counts = {name: int(share * subjects) for name, share in parts.items()}
    by_remainder = sorted(parts, key=lambda name: counts[name] - parts[name] * subjects)
    for name in by_remainder[: subjects - sum(counts.values())]:
        counts[name] += 1
    for name in parts:
        if not counts[name]:
            counts[max(counts, key=lambda other: counts[other])] -= 1
            counts[name] += 1
    return counts

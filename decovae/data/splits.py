"""Who trains, who validates, who tests: subjects in the order that a seed gives, and splits that a table declares."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Literal

from decovae.errors import InputError

Split = Literal["train", "validation", "test"]

COLUMN = "split"
_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


def key_of(subject: str) -> str:
    """What tells whether two names are one subject's: without BIDS' `sub-`, accents written one way."""
    return unicodedata.normalize("NFC", subject.strip()).removeprefix("sub-")


def ranked_subjects(subjects: Iterable[str], *, seed: int) -> list[str]:
    """The keys of subjects, each once, in the order of a hash of the seed and their name.

    Which of two comes first does not depend on who else takes part, so a cohort that grows hardly moves anybody. Of
    a subject whose name is written in several ways, the one that sorts first is hashed.
    """
    names: dict[str, str] = {}
    for name in sorted(set(subjects)):
        names.setdefault(key_of(name), name)
    return sorted(names, key=lambda key: (sha256(f"{seed}:{names[key]}".encode()).digest(), key))


def declared_splits(rows: Iterable[tuple[str, Mapping[str, str]]]) -> list[Split] | None:
    """What the column ``split`` says of each volume, in any case: train, training; val, valid, validation, dev; test.

    Args:
        rows: a volume's subject, and its columns.

    Returns:
        A split a volume, or None where no volume has such a column.

    Raises:
        InputError: some volumes have none or an unknown one, or a subject's volumes are in two.
    """
    splits: list[Split] = []
    of_subject: dict[str, Split] = {}
    undeclared: str | None = None
    declared = False
    for subject, columns in rows:
        text = columns.get(COLUMN)
        if text is None or not text.strip():
            declared = declared or text is not None
            undeclared = subject if undeclared is None else undeclared
            continue
        split = _NAMES.get(text.strip().lower())
        if split is None:
            raise InputError(
                f"subject {subject}: the column '{COLUMN}' says {text!r}; write train, validation or test there."
            )
        before = of_subject.setdefault(key_of(subject), split)
        if before != split:
            raise InputError(
                f"subject {subject} is in two splits, {before} and {split}; put all its sessions into one, or what is "
                "learnt from one of them is tested on another."
            )
        splits.append(split)
    if undeclared is not None and (declared or splits):
        raise InputError(
            f"subject {undeclared} has no value in the column '{COLUMN}'; write train, validation or test for every "
            "volume, or take the column out."
        )
    return splits if undeclared is None and splits else None

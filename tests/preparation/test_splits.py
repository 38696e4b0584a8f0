"""Who is held out: exact counts, whole subjects, the same people as training would pick."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decovae.data.patches import split_subjects
from decovae.errors import InputError
from decovae.preparation.splits import Splits, assign_splits


def rows(subjects: int, sessions: int = 1) -> list[tuple[str, dict[str, str]]]:
    return [(f"sub-{number:03d}", {}) for number in range(subjects) for _ in range(sessions)]


def counts(subjects: int, splits: Splits) -> Counter[str]:
    return Counter(assign_splits(rows(subjects), splits))


@settings(deadline=None)
@given(
    subjects=st.integers(3, 200),
    validation=st.sampled_from([0.0, 0.01, 0.1, 0.29, 1 / 3, 0.5]),
    test=st.sampled_from([0.0, 0.005, 0.1, 0.2, 0.49]),
    seed=st.integers(0, 2**40),
)
def test_shares_are_as_exact_as_whole_subjects_can_be(subjects: int, validation: float, test: float, seed: int) -> None:
    splits = Splits(validation=validation, test=test, seed=seed)
    if not validation and not test:
        assert assign_splits(rows(subjects), splits) is None
        return
    found = counts(subjects, splits)
    assert sum(found.values()) == subjects
    assert found["train"] >= 1
    for name, share in (("validation", validation), ("test", test)):
        assert abs(found[name] - share * subjects) < 1 or (share and found[name] == 1)
        assert (found[name] > 0) == (share > 0)


@pytest.mark.parametrize(
    ("subjects", "validation", "test", "expected"),
    [(10, 0.1, 0.1, (8, 1, 1)), (30, 0.1, 0.0, (27, 3, 0)), (100, 0.29, 0.07, (64, 29, 7)), (3, 0.01, 0.01, (1, 1, 1))],
)
def test_counts(subjects: int, validation: float, test: float, expected: tuple[int, int, int]) -> None:
    found = counts(subjects, Splits(validation=validation, test=test))
    assert (found["train"], found["validation"], found["test"]) == expected


def test_sessions_of_a_subject_never_cross_and_the_order_does_not_matter() -> None:
    volumes = rows(40, sessions=3)
    splits = assign_splits(volumes, Splits(validation=0.2, test=0.2))
    assert splits is not None
    of_subject = dict(zip((subject for subject, _ in volumes), splits, strict=True))
    assert splits == [of_subject[subject] for subject, _ in volumes]
    backwards = assign_splits(volumes[::-1], Splits(validation=0.2, test=0.2))
    assert backwards == splits[::-1]


def test_those_held_out_are_those_that_training_would_hold_out() -> None:
    volumes = rows(30, sessions=2)
    splits = assign_splits(volumes, Splits(validation=0.2, seed=5))
    _, held_out = split_subjects([subject for subject, _ in volumes], validation=6, seed=5)
    assert splits is not None
    assert [index for index, split in enumerate(splits) if split == "validation"] == held_out


def test_a_seed_is_another_choice() -> None:
    assert assign_splits(rows(40), Splits(test=0.2)) != assign_splits(rows(40), Splits(test=0.2, seed=1))


def test_the_column_says_it_in_any_case_and_in_several_words() -> None:
    words = ["Train", "training", "VAL", "valid", "validation", "dev", " test "]
    volumes = [(f"s{number}", {"split": word}) for number, word in enumerate(words)]
    assert assign_splits(volumes, Splits()) == ["train"] * 2 + ["validation"] * 4 + ["test"]


def declared(*splits: tuple[str, str]) -> list[tuple[str, dict[str, str]]]:
    return [(subject, {"split": split}) for subject, split in splits]


@pytest.mark.parametrize(
    ("volumes", "splits", "message"),
    [
        (declared(("a", "train"), ("a", "test")), Splits(), "subject a is in two splits, train and test"),
        (declared(("a", "train"), ("b", "holdout")), Splits(), "subject b: .* says 'holdout'"),
        (declared(("a", "train"), ("b", " ")), Splits(), "subject b has no value"),
        ([*declared(("a", "train")), ("b", {})], Splits(), "subject b has no value"),
        (declared(("a", ""), ("b", "")), Splits(), "subject a has no value"),
        (declared(("a", "train")), Splits(test=0.1), "column 'split', and --split.test"),
        (rows(9), Splits(validation=1.0), r"--split.validation 1: .* below 1"),
        (rows(9), Splits(test=-0.1), r"--split.test -0.1: .* at least 0"),
        (rows(9), Splits(test=float("nan")), r"--split.test nan"),
        (rows(9), Splits(validation=0.5, test=0.5), "leave nobody to train on"),
        (
            rows(2),
            Splits(validation=0.1, test=0.1),
            r"2 subjects cannot be split into 3 parts \(train, validation, test\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(volumes: list[tuple[str, dict[str, str]]], splits: Splits, message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign_splits(volumes, splits)


def test_a_split_that_was_not_asked_for_is_none() -> None:
    assert assign_splits(rows(5), Splits()) is None
    assert assign_splits([], Splits(test=0.5)) is None


def test_spellings_of_a_subject_are_one_subject() -> None:
    volumes = [
        (name, {})
        for number in range(20)
        for name in (f"{number:02d}", f"sub-{number:02d}", f" {number:02d}", "Zoe\u0308")
    ]
    volumes.append(("sub-Zo\u00eb", {}))
    splits = assign_splits(volumes, Splits(validation=0.3, test=0.3))
    assert splits is not None
    for number in range(20):
        assert len({split for (name, _), split in zip(volumes, splits, strict=True) if f"{number:02d}" in name}) == 1
    assert len({split for (name, _), split in zip(volumes, splits, strict=True) if "Zo" in name}) == 1
    _, held_out = split_subjects([subject for subject, _ in volumes], validation=6, seed=0)
    assert [index for index, split in enumerate(splits) if split == "validation"] == held_out
    with pytest.raises(InputError, match="subject 01 is in two splits"):
        assign_splits(declared(("sub-01", "train"), ("01", "test")), Splits())


def test_who_is_held_out_of_a_cohort_stays_who_it_was() -> None:
    names = [f"sub-{number:04d}" for number in range(40)]
    by_name = sorted(names, key=lambda name: sha256(f"3:{name}".encode()).digest())
    _, held_out = split_subjects(names, validation=4, seed=3)
    assert {names[index] for index in held_out} == set(by_name[:4])

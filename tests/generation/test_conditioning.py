"""Columns become conditions, rows of numbers and categories; guidance combines what a flow says with and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from decovae.errors import InputError
from decovae.generation.conditioning import (
    CategoricalCondition,
    ScalarCondition,
    drop_conditions,
    encode_conditions,
    fit_conditions,
    guided_velocity,
    parse_condition_options,
)

ROWS = [
    {"subject": "a", "age": "60", "sex": "F", "site": "north"},
    {"subject": "b", "age": " 70.5 ", "sex": "M", "site": "north"},
    {"subject": "c", "age": "49.5", "sex": "F", "site": "north"},
]
AGE = ScalarCondition("age", 60.0, math.sqrt(2 * 10.5**2 / 3))
SEX = CategoricalCondition("sex", ("F", "M"))


def test_numbers_become_scalars_and_the_rest_categories() -> None:
    sex, age = fit_conditions(["sex", "age"], ROWS)
    assert sex == SEX
    assert isinstance(age, ScalarCondition)
    assert (age.name, age.mean) == ("age", 60.0)
    assert age.std == pytest.approx(AGE.std)
    assert fit_conditions([], ROWS) == ()


def test_training_rows_are_standardised() -> None:
    conditions = fit_conditions(["age", "sex"], ROWS)
    rows = torch.stack([encode_conditions(conditions, row) for row in ROWS])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[:, 0].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[:, 0].square().mean(), torch.tensor(1.0))
    assert rows[:, 1].tolist() == [0, 1, 0]


def test_what_is_not_given_is_absent() -> None:
    assert encode_conditions([AGE, SEX], {}).isnan().all()
    assert encode_conditions([AGE, SEX], {"age": "", "sex": " "}).isnan().all()
    assert encode_conditions([AGE, SEX], {"sex": "M"})[1] == 1
    assert encode_conditions([], {"sex": "M"}).shape == (0,)


@pytest.mark.parametrize(
    ("names", "changed", "message"),
    [
        (["weight"], {}, "column 'weight': the manifest has no such column .*there are: age, sex, site"),
        (["age"], {"age": "old"}, "subject b: column 'age' has 'old' among numbers"),
        (["age"], {"age": "nan"}, "subject b: column 'age' has 'nan' among numbers"),
        (["age"], {"age": "inf", "subject": ""}, "row 2 of the volumes: column 'age' has 'inf' among numbers"),
        (["site"], {}, "column 'site': 'north' is the only value"),
        (["site:category"], {"site": ""}, "column 'site': 'north' is the only value"),
        (["sex", "sex"], {}, "column 'sex' is named twice"),
        (["sex", "sex:category"], {}, "column 'sex' is named twice"),
        (["sex:number"], {}, "subject a: column 'sex' has 'F' among numbers; .*sex:category"),
        (["age:scalar"], {}, "condition 'age:scalar': no such kind as 'scalar'; write age:number or age:category"),
        (["age:"], {}, "condition 'age:': no such kind as ''"),
    ],
)
def test_columns_that_cannot_condition_are_named(names: list[str], changed: dict[str, str], message: str) -> None:
    rows = [ROWS[0], {**ROWS[1], **changed}, ROWS[2]]
    with pytest.raises(InputError, match=message):
        fit_conditions(names, rows)


def test_equal_numbers_written_differently_are_refused() -> None:
    with pytest.raises(InputError, match="60 is the only value"):
        fit_conditions(["age"], [{"age": "60"}, {"age": "60.0"}])


def test_an_empty_value_is_an_absent_one() -> None:
    rows = [*ROWS, {"subject": "d", "age": " ", "sex": "M"}, {"subject": "e", "age": "60", "sex": ""}]
    conditions = fit_conditions(["age", "sex"], rows)
    assert conditions[0].mean == 60
    assert conditions[1] == SEX
    assert encode_conditions(conditions, rows[3]).isnan().tolist() == [True, False]
    assert encode_conditions(conditions, rows[4]).isnan().tolist() == [False, True]
    nobody = [{**row, "age": " " if place < 3 else "60"} for place, row in enumerate(rows)]
    with pytest.raises(InputError, match="column 'age' is empty for all volumes to train on"):
        fit_conditions(["age"], nobody, [0, 1, 2])


def test_training_rows_say_how_numbers_lie_and_all_rows_what_categories_there_are() -> None:
    rows = [*ROWS, {"subject": "d", "age": "1000", "sex": "other"}]
    age, sex = fit_conditions(["age", "sex"], rows, [0, 1, 2])
    assert isinstance(age, ScalarCondition)
    assert (age.mean, age.std) == (60, pytest.approx(AGE.std))
    assert sex == CategoricalCondition("sex", ("F", "M", "other"))
    assert encode_conditions([sex], rows[3]).tolist() == [2]
    with pytest.raises(InputError, match="column 'sex': 'F' is the only value of the volumes to train on"):
        fit_conditions(["sex"], rows, [0, 2])


def test_no_number_is_named_whichever_split_it_is_in() -> None:
    rows = [*ROWS, {"subject": "sub-0007", "age": "old", "sex": "F"}]
    with pytest.raises(InputError, match=r"^subject sub-0007: column 'age' has 'old' among numbers; give"):
        fit_conditions(["age"], rows, [0, 1, 2])


def test_codes_are_categories_where_the_name_says_so() -> None:
    rows = [{"sex": "0", "age": "60"}, {"sex": "1", "age": "70"}, {"sex": "", "age": "70"}]
    sex, age = fit_conditions(["sex:category", "age:number"], rows)
    assert sex == CategoricalCondition("sex", ("0", "1"))
    assert isinstance(age, ScalarCondition)
    assert age.name == "age"
    assert isinstance(fit_conditions(["sex"], rows)[0], ScalarCondition)
    assert fit_conditions(["bids:sex:category"], [{"bids:sex": "0"}, {"bids:sex": "1"}])[0].name == "bids:sex"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"subject": "s7", "age": "old"}, "^subject s7: column 'age' has 'old' among numbers; give a number"),
        ({"age": "inf"}, "^column 'age' has 'inf' among numbers"),
        ({"subject": "s7", "sex": "X"}, "^subject s7: column 'sex' has 'X', not F or M; give one of these"),
    ],
)
def test_a_row_that_cannot_be_encoded_is_named(row: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode_conditions([AGE, SEX], row)
    assert "such as" not in str(caught.value)


def test_at_most_32_categories() -> None:
    rows = [{"site": f"s{place:02}"} for place in range(33)]
    (condition,) = fit_conditions(["site"], rows[:32])
    assert isinstance(condition, CategoricalCondition)
    assert len(condition.values) == 32
    with pytest.raises(InputError, match="33 different values"):
        fit_conditions(["site"], rows)


def test_no_rows_are_a_programmer_s_error() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        fit_conditions(["age"], [])
    with pytest.raises(ValueError, match="at least one row"):
        fit_conditions(["age"], ROWS, [])


def test_options_are_parsed() -> None:
    assert parse_condition_options(["age=63", "sex = F"], [AGE, SEX]) == {"age": "63", "sex": "F"}
    assert parse_condition_options([], []) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["age"], "--condition age: write NAME=VALUE"),
        (["=3"], "--condition =3: write NAME=VALUE"),
        (["age="], "--condition age=: write NAME=VALUE"),
        (["weight=3"], "no condition 'weight'; choose age or sex"),
        (["age=old"], "--condition age=old: not a finite number; give one, such as 60"),
        (["sex=X"], "--condition sex=X: no such value; choose F or M"),
        (["age=3", "age=4"], "'age' is given twice"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_condition_options(options, [AGE, SEX])


def test_a_flow_without_conditions_takes_none() -> None:
    with pytest.raises(InputError, match="--condition age=3: this flow was trained without conditions"):
        parse_condition_options(["age=3"], [])


def test_whole_rows_are_dropped_and_entries_of_the_others() -> None:
    count, share = 20_000, 0.2
    batch = torch.randn(count, 3)
    draws = torch.rand(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dropped = drop_conditions(batch, share, draws)
    gone = dropped.isnan()
    assert torch.equal(dropped[~gone], batch[~gone])
    codes = (gone.long() * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8) / count
    for code, found in enumerate(codes.tolist()):
        absent = code.bit_count()
        expected = (1 - share) * share**absent * (1 - share) ** (3 - absent) + (share if absent == 3 else 0)
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / count), "every subset is seen"
    assert torch.equal(drop_conditions(batch[5:9], share, draws[5:9]).isnan(), gone[5:9])
    assert torch.equal(drop_conditions(batch, 0.0, draws), batch)
    assert drop_conditions(batch, 1.0, draws).isnan().all()
    assert drop_conditions(torch.empty(5, 0), 0.5, draws[:5, :1]).shape == (5, 0)
    assert batch.isfinite().all()


def test_guidance_extrapolates_from_absence_to_the_condition() -> None:
    calls: list[int] = []

    def network(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        calls.append(len(x))
        given = torch.zeros(len(x)) if condition is None else condition[:, 0].nan_to_num(0.0)
        return x * t.view(-1, 1) + given[:, None]

    x, condition = torch.randn(2, 3), torch.tensor([[1.0], [2.0]])
    for t in (torch.tensor([0.25, 0.5]), torch.tensor(0.5)):
        absent = x * t.view(-1, 1)
        for guidance in (0.0, 1.0, 3.0, -0.5):
            torch.testing.assert_close(
                guided_velocity(network, x, t, condition, guidance), absent + guidance * condition
            )
        torch.testing.assert_close(guided_velocity(network, x, t, None, 3.0), absent)
    assert calls == [2, 2, 4, 4, 2] * 2

"""What solvers are given, and what they refuse; how exact they are is in test_toy_flows.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decovae.errors import InputError
from decovae.generation.solvers import SOLVERS, evaluations, integrate

TIMES = torch.linspace(0, 1, 6, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_velocity_moves_by_the_time(solver: str) -> None:
    start = torch.randn(1, 2, 3, 4, 5)
    velocity = torch.randn(1, 2, 3, 4, 5)
    end = integrate(lambda x, t: velocity, start, TIMES, solver=solver)
    assert end.dtype == start.dtype
    torch.testing.assert_close(end, start + velocity)
    torch.testing.assert_close(integrate(lambda x, t: velocity, end, TIMES.flip(0), solver=solver), start)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("backwards", [False, True])
def test_velocities_are_asked_for_as_often_as_stated_at_scalar_times(solver: str, backwards: bool) -> None:
    times = TIMES.flip(0) if backwards else TIMES
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.ndim == 0
        assert t.dtype == x.dtype
        asked.append(float(t))
        return -x

    integrate(velocity, torch.ones(3, 1), times, solver=solver)
    assert len(asked) == evaluations(solver, 5)
    assert asked[0] == times[0]
    assert min(asked) >= 0
    assert max(asked) <= 1


def test_heun_and_midpoint_are_what_they_are_called() -> None:
    """dx/dt = x + t from 1, one step of 0.5: slopes 1, then 2 at x = 1.5, or 1.5 at t = 0.25 and x = 1.25."""
    start, times = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 0.5], dtype=torch.float64)
    expected = {"euler": 1 + 0.5 * 1, "heun": 1 + 0.25 * (1 + 2), "midpoint": 1 + 0.5 * 1.5}
    for solver, value in expected.items():
        assert integrate(lambda x, t: x + t, start, times, solver=solver).item() == pytest.approx(value, abs=1e-12)


def test_a_step_solver_s_samples_do_not_see_each_other() -> None:
    start = torch.randn(4, 6)
    for solver in ("euler", "heun", "midpoint"):
        together = integrate(lambda x, t: x.sin() + t, start, TIMES, solver=solver)
        alone = [integrate(lambda x, t: x.sin() + t, part, TIMES, solver=solver) for part in start.split(1)]
        assert torch.equal(together, torch.cat(alone))


def test_dopri5_takes_one_sample() -> None:
    with pytest.raises(ValueError, match="one sample at a time, got 2"):
        integrate(lambda x, t: x, torch.ones(2, 3), TIMES, solver="dopri5")


def test_evaluations_of_dopri5_are_not_known() -> None:
    assert [evaluations(solver, 30) for solver in SOLVERS] == [30, 60, 60, None]


@pytest.mark.parametrize(
    "call", [lambda: evaluations("rk4", 3), lambda: integrate(torch.add, TIMES, TIMES, solver="rk4")]
)
def test_an_unknown_solver_is_named_with_those_there_are(call: object) -> None:
    with pytest.raises(InputError, match="--solver rk4: no such solver; choose euler, heun, midpoint or dopri5"):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 0.5], [[0.0, 1.0]]])
def test_times_that_lead_nowhere_are_refused(times: list[object]) -> None:
    with pytest.raises(ValueError, match="at least two, ascending or descending"):
        integrate(lambda x, t: x, torch.ones(1), torch.tensor(times, dtype=torch.float64), solver="euler")

"""The ordinary differential equation of a flow, dx/dt = v(x, t), solved by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from torch import Tensor
from torchdiffeq import odeint

from decovae.errors import InputError

Solver: TypeAlias = Literal["euler", "heun", "midpoint", "dopri5"]
Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]

SOLVERS: tuple[str, ...] = get_args(Solver)

TOLERANCE = 1e-4
"""Of dopri5 unless told otherwise. It knows the error of small steps only: at 1e-3 a straight flow can be wrong by 20
times as much, at 1e-4 by 3 times."""

_METHODS = {"euler": "euler", "heun": "heun2", "midpoint": "midpoint", "dopri5": "dopri5"}
_EVALUATIONS_A_STEP = {"euler": 1, "heun": 2, "midpoint": 2}


def integrate(velocity: Velocity, start: Tensor, times: Tensor, *, solver: str, tolerance: float = TOLERANCE) -> Tensor:
    """The state at the last time of one that is `start` at the first.

    Euler's method is of first order, Heun's and the midpoint method of second; all three step from each time to the
    next. Dormand and Prince's method of fifth order chooses its own steps between the first and the last time.

    Args:
        velocity: (x, t) → dx/dt, like x; t is a scalar tensor in the dtype and on the device of x.
        start: (N, …), floating point; for dopri5 N = 1, because its step suits the whole batch, so that a sample would
            depend on those beside it.
        times: (T,), at least two, ascending or descending; float64, that a step is the difference of exact times.
        solver: "euler", "heun", "midpoint" or "dopri5".
        tolerance: of dopri5, on the root mean square of a step's error, absolute and relative to the state.

    Returns:
        Like `start`.

    Raises:
        InputError: an unknown solver.
        ValueError: `times` is too short or not monotonic, or dopri5 is given more than one sample.
    """
    _check(solver)
    steps = times.diff()
    if times.ndim != 1 or len(times) < 2 or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"times are at least two, ascending or descending, got {times.tolist()}")
    if solver == "dopri5":
        if start.shape[0] != 1:
            raise ValueError(f"dopri5 takes one sample at a time, got {start.shape[0]}: its steps would couple them")
        times = times[[0, -1]]
    path: Tensor = odeint(
        lambda t, x: velocity(x, t),
        start,
        times.to(start.device),
        rtol=tolerance,
        atol=tolerance,
        method=_METHODS[solver],
    )
    return path[-1]


def evaluations(solver: str, steps: int) -> int | None:
    """How often `integrate` evaluates the velocity over that many steps; None where that depends on the velocity.

    Raises:
        InputError: an unknown solver.
    """
    _check(solver)
    return None if solver == "dopri5" else steps * _EVALUATIONS_A_STEP[solver]


def _check(solver: str) -> None:
    if solver not in SOLVERS:
        raise InputError(f"--solver {solver}: no such solver; choose {', '.join(SOLVERS[:-1])} or {SOLVERS[-1]}.")

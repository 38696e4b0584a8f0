"""How large rows are, and whether they are measured or only counted: said by the environment, once for a process.

DECOVAE_BENCH_SCALE is ``gpu`` (the paper's sizes), ``cpu`` (what two cores measure in a quarter of an hour) or ``tiny``
(a test of the suites themselves); without it, ``gpu`` where there is CUDA and else ``cpu``. DECOVAE_BENCH_COUNT=1 runs
nothing: a row then states its case and its floors alone. Sizes, dtypes and which rows there are follow from the scale,
not from the device, so that rows of scale ``gpu`` are counted on a laptop.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, TypeVar, cast, get_args

import pytest
import torch

Scale = Literal["gpu", "cpu", "tiny"]
T = TypeVar("T")

SCALE_VARIABLE = "DECOVAE_BENCH_SCALE"
COUNT_VARIABLE = "DECOVAE_BENCH_COUNT"


def chosen_scale(environment: Mapping[str, str], *, cuda: bool) -> Scale:
    """The scale that an environment asks for.

    Args:
        environment: variables and their values.
        cuda: whether there is a GPU.

    Raises:
        pytest.UsageError: there is no such scale.
    """
    name = environment.get(SCALE_VARIABLE) or ("gpu" if cuda else "cpu")
    if name not in get_args(Scale):
        raise pytest.UsageError(f"{SCALE_VARIABLE}={name}: no such scale; choose {', '.join(get_args(Scale))}.")
    return cast(Scale, name)


def counts_only(environment: Mapping[str, str]) -> bool:
    """Whether an environment asks for counts alone.

    Raises:
        pytest.UsageError: the variable is neither 0 nor 1.
    """
    value = environment.get(COUNT_VARIABLE) or "0"
    if value not in ("0", "1"):
        raise pytest.UsageError(f"{COUNT_VARIABLE}={value}: neither 0 nor 1; 1 only counts, 0 measures.")
    return value == "1"


SCALE: Scale = chosen_scale(os.environ, cuda=torch.cuda.is_available())

COUNT_ONLY: bool = counts_only(os.environ)

DEVICE = torch.device("meta" if COUNT_ONLY else "cuda" if torch.cuda.is_available() else "cpu")
"""Where rows are measured; where nothing is, a device without memory."""

ON_CPU = DEVICE.type == "cpu"


def at_scale(*, gpu: T, cpu: T, tiny: T) -> T:
    """The value for this process's scale."""
    values: dict[Scale, T] = {"gpu": gpu, "cpu": cpu, "tiny": tiny}
    return values[SCALE]


DTYPE = at_scale(gpu=torch.bfloat16, cpu=torch.float32, tiny=torch.float32)
"""Of the networks' products: autocast's at scale gpu, the parameters' elsewhere."""

PRECISION: Literal["bf16", "fp32"] = at_scale(gpu="bf16", cpu="fp32", tiny="fp32")
"""The same, as this project's options call it."""


def seconds(wanted: float) -> float:
    """How long a row's calls are repeated: so long, and at ``tiny`` hardly at all."""
    return 0.02 if SCALE == "tiny" else wanted


LEAST_ROUNDS = at_scale(gpu=5, cpu=5, tiny=2)
"""Calls of a row that are timed, at least."""

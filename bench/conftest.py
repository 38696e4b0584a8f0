"""Puts the machine and the share of the floor into the results, and takes names and single timings out."""

from __future__ import annotations

from typing import Any

import pytest

from bench.table import share_of_floor
from decovae import machine


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # Replaced, not extended: pytest-benchmark's own record has the host's name, and builds and paths nobody needs.
    machine_info.clear()
    machine_info.update(machine.describe())


@pytest.hookimpl
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    kept = {key: commit_info.get(key) for key in ("id", "time", "dirty")}
    commit_info.clear()
    commit_info.update(kept)


@pytest.hookimpl
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single timing: megabytes that no table shows
        benchmark["extra_info"]["share_of_floor"] = share_of_floor(benchmark)

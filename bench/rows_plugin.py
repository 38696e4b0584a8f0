"""pytest writes what becomes of each benchmark as it ends, and runs the ones that it is told to, in that order.

    pytest bench --rows-out rows.jsonl [--rows FILE] [--without FILE] [--deadline SECONDS]

`bench.campaign.rows` says what a line holds. A row is "measured" if pytest-benchmark timed it, "counted" where
``DECOVAE_BENCH_COUNT=1`` has nothing run, and "ran" if it passed and nothing timed it, as with --benchmark-disable.
With --collect-only the lines are the ids. After a CUDA error that leaves the process useless it ends, with exit code
77. It takes tests as it takes benchmarks; the workers of pytest-xdist write each their own.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.campaign.rows import Row, append, failed, one_line

CUDA_IS_LOST = 77
"""Exit code after an error that every later call would repeat."""

LOSES_CUDA = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure", "misaligned")
"""In an error's text. Memory that ran out is none of these, whatever else its text says."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rows", "rows of benchmarks")
    group.addoption("--rows-out", type=Path, metavar="FILE", help="append a line of JSON for each row, as it ends")
    group.addoption("--rows", type=Path, metavar="FILE", help="ids to run, a line each, in this order")
    group.addoption("--without", type=Path, metavar="FILE", help="ids not to run, a line each")
    group.addoption("--deadline", type=float, metavar="SECONDS", help="since 1970: no row begins after it")


def pytest_configure(config: pytest.Config) -> None:
    out, rows, without, deadline = (
        config.getoption(name, None) for name in ("rows_out", "rows", "without", "deadline")
    )
    if getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # it only hands rows to workers, which have read the same options
    if any(option is not None for option in (out, rows, without, deadline)):
        config.pluginmanager.register(_Rows(out, rows, without, deadline), "rows of benchmarks")
    if out is not None and sys.__stderr__ is not None:
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)  # asked before a row that hangs is killed


class _Rows:
    def __init__(self, out: Path | None, rows: Path | None, without: Path | None, deadline: float | None) -> None:
        self.out, self.deadline = out, deadline
        self.wanted = None if rows is None else rows.read_text(encoding="utf-8").splitlines()
        self.unwanted = set() if without is None else set(without.read_text(encoding="utf-8").splitlines())
        self.since = 0.0
        self.row: dict[str, Any] = {}
        self.cuda_is_lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.unwanted:
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.unwanted])
            items[:] = [item for item in items if item.nodeid not in self.unwanted]
        if self.wanted is None:
            return
        found = {item.nodeid: item for item in items}
        for row in self.wanted:
            if row not in found:
                self._append(failed(row, "pytest did not find it"))
        items[:] = [found[row] for row in self.wanted if row in found]
        config.hook.pytest_deselected(items=[item for row, item in found.items() if row not in self.wanted])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            for item in session.items:
                self._append(Row(item.nodeid, "collected"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if self.deadline is not None and time.time() > self.deadline:
            return True  # passed over
        self.since, self.row = time.perf_counter(), {"outcome": "ran"}
        self._append(Row(item.nodeid, "started", finished=time.time()))
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call":
            self.row |= _measurement(item)
        if report.failed and call.excinfo is None:
            self.row |= {"outcome": "failed", "reason": one_line(str(report.longrepr))}  # passed, and was not to
        elif report.outcome != "passed" and call.excinfo is not None:
            error = call.excinfo.value
            self.row |= {"outcome": report.outcome, "reason": _reason(error)}
            if report.failed and loses_cuda(error):
                self.cuda_is_lost = True
                print(report.longreprtext, file=sys.stderr)  # pytest would at its end, which will not come
        return report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = time.perf_counter() - self.since
        row = Row(nodeid, finished=time.time(), seconds=seconds, **self.row)
        # What failed may have been timed before, and is not to be taken for a result.
        self._append(Row(**{**row.__dict__, "stats": None}) if row.outcome in ("failed", "skipped") else row)
        if self.cuda_is_lost:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(CUDA_IS_LOST)  # what else would run at the end may hang on the lost device

    def _append(self, row: Row) -> None:
        if self.out is not None:
            append(self.out, row)


def loses_cuda(error: BaseException) -> bool:
    """Whether an error, or what caused it, leaves the process unable to use its GPU."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        text = str(cause)
        out_of_memory = "out of memory" in text.lower()
        if not out_of_memory and (
            type(cause).__name__ == "AcceleratorError" or any(said in text for said in LOSES_CUDA)
        ):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def _measurement(item: pytest.Item) -> dict[str, Any]:
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    extra_info = dict(getattr(benchmark, "extra_info", None) or {}) or None
    if os.environ.get("DECOVAE_BENCH_COUNT") == "1":
        return {"outcome": "counted", "extra_info": extra_info}
    # What the row read right behind its rounds: by now the GPU idles.
    gpu = extra_info.pop("gpu", None) if extra_info else None
    timed = getattr(benchmark, "stats", None)
    if not timed:
        return {"extra_info": extra_info}
    stats = {name: float(getattr(timed.stats, name)) for name in ("median", "iqr", "min", "max")}
    stats["rounds"] = int(timed.stats.rounds)
    return {"outcome": "measured", "extra_info": extra_info, "stats": stats, "gpu": gpu}


def _reason(error: BaseException) -> str:
    said = one_line(str(getattr(error, "msg", None) or error))
    if isinstance(error, (pytest.skip.Exception, pytest.fail.Exception)):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__

"""The rows of a campaign: one benchmark each, a line of JSON in ``rows.jsonl``, and which there are.

A row's line is appended as it ends, by the process that ran it, so that whatever ends that process loses no other row.
Before that stands a line that the row has started: where nothing follows it, the process died in that row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from bench import processes
from bench.processes import ROOT
from decovae.errors import InputError, RunError

Outcome = Literal["collected", "started", "measured", "counted", "ran", "skipped", "failed", "stopped"]
"""Of a line. A row that "ran" was not timed; one that was "stopped" is to be run again, by its reason with `TIME` for
time, else by a signal; see `read_rows`."""

TIME = "time was up"

DIED = "the process died"

STOPS = 2
"""How often a row may be stopped for time before it counts as failed."""

COLLECT_SECONDS = 300.0

LONGEST_REASON = 300
"""Characters of a reason."""


@dataclass(frozen=True)
class Row:
    """What became of one benchmark.

    Attributes:
        id: pytest's, such as ``bench/test_blocks.py::test_decoding[ours]``.
        outcome: "measured", "counted" (only what it would cost at least), "ran" (not timed), "skipped" or "failed".
        reason: why it was skipped, or how it failed; one line.
        finished: seconds since 1970.
        seconds: that all of it took, with compiling and counting.
        stats: of a call, in seconds: "median", "iqr", "min", "max", and the number of "rounds".
        extra_info: what the row states of itself, and counted beside the timing.
        gpu: `decovae.machine.reading` right behind its timed calls.
    """

    id: str
    outcome: Outcome
    reason: str | None = None
    finished: float = 0.0
    seconds: float = 0.0
    stats: dict[str, float] | None = None
    extra_info: dict[str, Any] | None = None
    gpu: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Row:
        """A line of the file.

        Raises:
            KeyError: it is not one.
        """
        rest = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**{**rest, "id": content["row"], "outcome": content["outcome"]})

    def as_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        content = asdict(self)
        return {"row": content.pop("id"), **content}


def append(path: Path, row: Row) -> None:
    """Add a line, by one write."""
    line = json.dumps(row.as_dict(), ensure_ascii=False, default=str) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def trim(path: Path) -> None:
    """Cut off a torn last line, so that the next one is not lost with it."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(path, whole)


def read_lines(path: Path) -> list[Row]:
    """All lines of the file but a torn last one.

    Raises:
        InputError: it cannot be read, or a line in it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    return [_parsed(path, number, line) for number, line in enumerate(text.split("\n")[:-1], start=1)]


def _parsed(path: Path, number: int, line: str) -> Row:
    try:
        return Row.from_dict(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: line {number} is damaged; remove that line to measure its row again.") from error


def read_rows(path: Path) -> list[Row]:
    """The last word on each row, in the order in which they first began.

    A row that started and did not end has failed, and so has one that was stopped for time for the second time; one
    that was stopped once, or by a signal, is left out.

    Raises:
        InputError: the file cannot be read, or a line in it is damaged.
    """
    last, stops = _last_words(path)
    found = []
    for row in last.values():
        if row.outcome == "started":
            found.append(Row(row.id, "failed", DIED, row.finished))
        elif len(stops.get(row.id, ())) >= STOPS:
            longest = max(stop.seconds for stop in stops[row.id])
            found.append(failed(row.id, f"did not end within {longest:.0f} s; stopped twice", row.finished))
        elif row.outcome not in ("stopped", "collected"):
            found.append(row)
    return found


def read_stopped(path: Path) -> set[str]:
    """Rows that were stopped for time when they last ran; errors as for `read_rows`."""
    return set(_last_words(path)[1])


def _last_words(path: Path) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    """The last line on each row, and how often each was stopped for time since it last ended otherwise."""
    last: dict[str, Row] = {}
    stops: dict[str, list[Row]] = {}
    for row in read_lines(path):
        last[row.id] = row
        if row.outcome == "stopped" and row.reason == TIME:
            stops.setdefault(row.id, []).append(row)
        elif row.outcome not in ("started", "stopped"):
            stops.pop(row.id, None)
    return last, stops


def one_line(text: str) -> str:
    """The first line of what went wrong, without the folders of the machine that it went wrong on."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = re.sub(r"(?<![\w.:/])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", line)
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"


def environment(scale: str, *, count: bool = False) -> dict[str, str]:
    """What a process that runs rows of a scale finds in its environment: this project first, wherever it runs."""
    return {
        **processes.environment(),
        "DECOVAE_BENCH_SCALE": scale,
        "DECOVAE_BENCH_COUNT": "1" if count else "0",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # others could reorder rows, and take time to load
    }


def pytest_command(suites: list[str], rows_out: Path, *options: str) -> list[str]:
    """pytest on these suites with this project's plug-in; what rows print is not captured."""
    plugins = ["-p", "pytest_benchmark.plugin", "-p", "bench.rows_plugin", "-p", "no:cacheprovider"]
    output = ["--rows-out", str(rows_out), "--capture=no"]
    return [sys.executable, "-m", "pytest", *suites, *plugins, *output, *options]


def collect_rows(scale: str, *, root: Path = ROOT, suites: str = "bench") -> list[str]:
    """Ids of all rows of a scale, in pytest's order; what cannot be collected is told on standard error.

    Args:
        scale: "gpu", "cpu" or "tiny".
        root: pytest's root, which ids are relative to.
        suites: folder below it.

    Raises:
        RunError: nothing could be collected, or it takes longer than `COLLECT_SECONDS`.
    """
    rows = _rows_of_a_process(scale, root, suites, "--collect-only", count=False, seconds=COLLECT_SECONDS)
    return [row.id for row in rows]


def count_rows(scale: str, *, root: Path = ROOT, suites: str = "bench") -> list[Row]:
    """All rows of a scale, counted and not run; arguments and errors as for `collect_rows`."""
    return _rows_of_a_process(scale, root, suites, count=True)


def _rows_of_a_process(
    scale: str, root: Path, suites: str, *options: str, count: bool, seconds: float | None = None
) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        try:
            process = subprocess.run(
                pytest_command([suites], path, "--continue-on-collection-errors", *options),
                cwd=root,
                env=environment(scale, count=count),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"{suites}: collecting its rows took longer than {seconds:g} s; try again.") from None
        found = [row for row in read_lines(path) if row.outcome != "started"]
    said = (process.stdout + process.stderr).strip().splitlines()
    if not found:
        raise RunError(f"{suites}: no rows ({one_line(said[-1]) if said else 'pytest said nothing'}).")
    for line in said:
        if line.startswith("ERROR "):
            print(f"warning: {one_line(line.removeprefix('ERROR '))} cannot be collected", file=sys.stderr)
    return found


def failed(row: str, reason: str, finished: float | None = None) -> Row:
    """A row that somebody else says has failed, by default now."""
    return Row(row, "failed", one_line(reason), time.time() if finished is None else finished)

"""Running a study's commands on this machine: side by side, each once, resumable, with what they took noted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decovae.errors import InputError, RunError
from decovae.files import write_text
from decovae.report.study import Cell

RECORD = "study.json"
VERSION = 1

POLL = 0.2
"""Seconds between looks at the running commands."""

LAST_LINES = 3
"""Of a failed command's log that the error shows."""

SCRIPTS = Path(__file__).resolve().parents[2]
"""Where train/ lies: in the clone that the package was installed from."""


class Record:
    """``study.json``: what the study is, the seconds it took, and of each cell command, end, seconds and peak memory.

    Args:
        folder: of the study.
        facts: what the study is, in JSON's types.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.path = folder / RECORD
        earlier = read_record(self.path)
        self.content: dict[str, Any] = {
            "kind": "study",
            "version": VERSION,
            **facts,
            "seconds": earlier["seconds"],
            "cells": earlier["cells"],
        }

    def done(self, cell: Cell) -> bool:
        """Whether the cell's result is there, and not of other arguments."""
        entry = self.content["cells"].get(cell.name)
        return cell.done.is_file() and (entry is None or entry["arguments"] == list(cell.arguments))

    def older(self, cell: Cell, before: str) -> bool:
        """Whether the cell's result is older than that of ``before``, which it needs, as far as both ran here."""
        cells = self.content["cells"]
        return bool(cell.name in cells and before in cells and cells[cell.name]["finished"] < cells[before]["finished"])

    def add_seconds(self, seconds: float) -> None:
        """Add to the time that the study took, and write the file."""
        self.content["seconds"] = round(self.content["seconds"] + seconds, 1)
        self.write()

    def note(self, cell: Cell, *, seconds: float, peak_memory_gb: float) -> None:
        """Note a success, and write the file."""
        self.content["cells"][cell.name] = {
            "arguments": list(cell.arguments),
            "finished": time.time(),
            "seconds": round(seconds, 1),
            "peak_memory_gb": round(peak_memory_gb, 2),
        }
        self.write()

    def write(self) -> None:
        """Write the file whole or not at all."""
        write_text(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """The ``seconds`` that a study took so far and its ``cells``, from its ``study.json``; none where there is no file.

    Raises:
        InputError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"seconds": float(content["seconds"]), "cells": dict(content["cells"])}
    except FileNotFoundError:
        return {"seconds": 0.0, "cells": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); remove it: the runs beside it are found again."
        ) from error


def unfinished(planned: Sequence[Cell], record: Record) -> list[Cell]:
    """The cells to run: those whose result is not there, and all that need one that was or will be run after them.

    A result that is there and not in the record was made by other means, such as a cluster's, and is taken as it is.
    """
    again: list[Cell] = []
    names: set[str] = set()
    for cell in planned:
        if not record.done(cell) or any(name in names or record.older(cell, name) for name in cell.after):
            again.append(cell)
            names.add(cell.name)
    return again


@dataclass
class Running:
    """A command that runs."""

    cell: Cell
    process: subprocess.Popen[bytes]
    since: float


class Runner:
    """Runs cells side by side, in their order as far as what they need is there.

    Args:
        folder: of the study; logs go to ``logs`` in it.
        record: where successes are noted.
        jobs: commands at a time.
        processes: of a command; more than 1 are started by torchrun.
        threads: of each process, for arithmetic on the CPU.
    """

    def __init__(self, folder: Path, record: Record, *, jobs: int, processes: int, threads: int) -> None:
        self.folder, self.record, self.jobs, self.processes, self.threads = folder, record, jobs, processes, threads
        self.running: list[Running] = []

    def run(self, planned: Sequence[Cell]) -> None:
        """Run what is not done.

        Raises:
            RunError: a command failed; its message has the end of its log. What ran beside it is stopped.
            KeyboardInterrupt: after SIGINT or SIGTERM, once what ran has stopped where it can go on.
        """
        waiting = unfinished(planned, self.record)
        todo = {cell.name for cell in waiting}
        if skipped := len(planned) - len(waiting):
            print(f"{skipped} of {len(planned)} steps are done.", flush=True)
        self.total = len(planned)
        with self._interruptible(), self._timed():
            while waiting or self.running:
                for cell in [cell for cell in waiting if not todo.intersection(cell.after)]:
                    if len(self.running) < self.jobs:
                        waiting.remove(cell)
                        self.running.append(self._start(cell))
                time.sleep(POLL)
                for cell in self._ended():
                    todo.discard(cell.name)
                    print(self._line(cell, self.total - len(todo)), flush=True)

    def _line(self, cell: Cell, done: int) -> str:
        seconds = self.record.content["cells"][cell.name]["seconds"]
        return f"[{done:{len(str(self.total))}}/{self.total}] {cell.name}: {seconds:.0f} s"

    def _log(self, cell: Cell) -> Path:
        return self.folder / "logs" / (cell.name.replace("/", "-") + ".log")

    def _start(self, cell: Cell) -> Running:
        tool = ["-m", "decovae.cli"] if cell.tool == "decovae" else [str(script(cell.tool))]
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        log = self._log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*launcher, *tool, *cell.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,  # signals reach it through `_stop` alone, and once
            )
        return Running(cell, process, time.perf_counter())

    def _ended(self) -> Iterator[Cell]:
        """Cells that have ended with success since the last look."""
        for entry in list(self.running):
            pid, status, usage = os.wait4(entry.process.pid, os.WNOHANG)
            if pid == 0:
                continue
            self.running.remove(entry)
            entry.process.returncode = code = os.waitstatus_to_exitcode(status)
            if code != 0 or not entry.cell.done.is_file():
                self._stop()
                raise RunError(self._failure(entry.cell, code))
            kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)  # there it counts bytes
            self.record.note(
                entry.cell, seconds=time.perf_counter() - entry.since, peak_memory_gb=kilobytes * 1024 / 1e9
            )
            yield entry.cell

    def _failure(self, cell: Cell, code: int) -> str:
        log = self._log(cell)
        text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " ".join(line.strip() for line in text[-LAST_LINES:]) or "it said nothing"
        how = f"ended with exit code {code}" if code else f"left no {cell.done.name}"
        return f"{cell.name} {how}: {said} (all of it: {log}). The same command goes on from there."

    def _stop(self) -> None:
        """Ask what runs to stop, and wait for it: trainings write a checkpoint first."""
        for entry in self.running:
            entry.process.send_signal(signal.SIGINT)
        for entry in self.running:
            entry.process.wait()
        self.running.clear()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        since = time.perf_counter()
        try:
            yield
        finally:
            self.record.add_seconds(time.perf_counter() - since)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """SIGTERM is taken like Ctrl-C, and either stops what runs."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def script(name: str) -> Path:
    """A script of ``train/``.

    Raises:
        InputError: the package was installed without it.
    """
    path = SCRIPTS / name
    if not path.is_file():
        raise InputError(f"decovae study: {path} is missing; clone the repository and install it with pip install -e .")
    return path

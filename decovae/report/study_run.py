"""Running a study's commands on this machine: side by side, each once, resumable, with what they took noted."""

from __future__ import annotations

import json
import math
import os
import re
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
from decovae.files import locked, write_text
from decovae.report.run_files import STUDY
from decovae.report.study import Cell

VERSION = 1

POLL = 0.2
"""Seconds between looks at the running commands."""

PATIENCE = 120.0
"""Seconds that a command has to stop where it can go on, before it is asked again, which it obeys at once."""

LAST_LINES = 3
"""Of a failed command's log that the error shows."""

SCRIPTS = Path(__file__).resolve().parents[2]
"""Where train/ lies: in the clone that the package was installed from."""


class Record:
    """``study.json``: what the study is, the seconds it took, and of each cell command, end, seconds and peak memory.

    Seconds and memory are those of all attempts at a cell: one that was stopped is listed under ``unfinished``.

    Args:
        folder: of the study.
        facts: what the study is, in JSON's types.

    Raises:
        InputError: the file is damaged.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.path = folder / STUDY
        earlier = read_record(self.path)
        self.content: dict[str, Any] = {
            "kind": "study",
            "version": VERSION,
            **facts,
            **earlier,
        }

    def done(self, cell: Cell) -> bool:
        """Whether the cell's result is there, and not of other arguments."""
        entry = self.content["cells"].get(cell.name)
        return cell.done.is_file() and (entry is None or entry["arguments"] == list(cell.arguments))

    def older(self, cell: Cell) -> bool:
        """Whether the cell's result is older than one that it was made from, as far as both were made here."""
        cells = self.content["cells"]
        ends = [cells[name]["finished"] for name in cell.after if name in cells]
        return bool(ends and cell.name in cells and cells[cell.name]["finished"] < max(ends))

    def add_seconds(self, seconds: float) -> None:
        """Add to the time that the study took, and write the file."""
        self.content["seconds"] = round(self.content["seconds"] + seconds, 2)
        self.write()

    def note(self, cell: Cell, *, seconds: float, peak_memory_gb: float) -> None:
        """Note a success, and write the file."""
        attempts = self._attempts(cell, seconds, peak_memory_gb)
        self.content["unfinished"].pop(cell.name, None)
        # The end is that of the file: a command that found its result there has left it as it was.
        self.content["cells"][cell.name] = {**attempts, "finished": cell.done.stat().st_mtime}
        self.write()

    def note_unfinished(self, cell: Cell, *, seconds: float, peak_memory_gb: float) -> None:
        """Note an attempt that was stopped or failed, and write the file."""
        self.content["unfinished"][cell.name] = self._attempts(cell, seconds, peak_memory_gb)
        self.write()

    def _attempts(self, cell: Cell, seconds: float, peak_memory_gb: float) -> dict[str, Any]:
        """This attempt at a cell together with those before it that went by the same arguments."""
        before = self.content["unfinished"].get(cell.name, {})
        if before.get("arguments") != list(cell.arguments):
            before = {"seconds": 0.0, "peak_memory_gb": 0.0}
        return {
            "arguments": list(cell.arguments),
            "seconds": round(before["seconds"] + seconds, 1),
            "peak_memory_gb": max(before["peak_memory_gb"], round(peak_memory_gb, 2)),
        }

    def write(self) -> None:
        """Write the file whole or not at all."""
        write_text(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """The ``seconds`` that a study took so far, its ``cells`` and its ``unfinished`` ones, from its ``study.json``;
    none where there is no file.

    Raises:
        InputError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        unfinished = dict(content.get("unfinished", {}))  # which an older one has not
        return {"seconds": float(content["seconds"]), "cells": dict(content["cells"]), "unfinished": unfinished}
    except FileNotFoundError:
        return {"seconds": 0.0, "cells": {}, "unfinished": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}); remove it: the runs beside it are found again."
        ) from error


def to_run(cell: Cell, record: Record) -> bool:
    """Whether a cell whose needs are there has to be run: its result is not there, of other arguments, or outdated.

    A result that is there and not in the record was made by other means, such as a cluster's, and is taken as it is.

    Raises:
        InputError: it is outdated, and its command would not make it anew.
    """
    outdated = cell.done.is_file() and record.older(cell)
    if outdated and not cell.overwrites:
        raise InputError(
            f"{cell.done.parent}: was made from results that are others now; remove that folder, and the same command "
            "makes it again."
        )
    return outdated or not record.done(cell)


@dataclass
class Running:
    """A command that runs, when it began, and where in its log."""

    cell: Cell
    process: subprocess.Popen[bytes]
    since: float
    log_start: int


@dataclass
class Ended:
    """A command that has ended: with which exit code, after how long, and what it held at most."""

    entry: Running
    code: int
    seconds: float
    peak_memory_gb: float

    @property
    def succeeded(self) -> bool:
        """Whether it did what it was to do."""
        return self.code == 0 and self.entry.cell.done.is_file()


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
        self.todo: set[str] = set()
        self.total = 0
        self.until = math.inf
        self.since = 0.0
        self.lock = -1

    @property
    def began(self) -> bool:
        """Whether the folder was no other's, so that its files may be written."""
        return self.lock != -1

    def run(self, planned: Sequence[Cell], *, until: float = math.inf) -> list[Cell]:
        """Run what is not done.

        Args:
            planned: the cells.
            until: the time, of `time.monotonic`, at which what runs is stopped where it can go on.

        Returns:
            The cells that are not done yet.

        Raises:
            RunError: a command failed; its message has the end of its log. What ran beside it is stopped.
            InputError: a command refused its input, a result is outdated, or the folder is in use.
            KeyboardInterrupt: after SIGINT, SIGTERM or SIGHUP, once what ran has stopped where it can go on.
        """
        self.until = until
        waiting, self.todo = list(planned), {cell.name for cell in planned}
        self.total, skipped = len(planned), 0
        with self._alone(), self._timed(), self._stopping():
            while waiting or self.running:
                for cell in list(waiting):
                    if self.todo.intersection(cell.after):
                        continue
                    if not to_run(cell, self.record):
                        waiting.remove(cell)
                        self.todo.discard(cell.name)
                        skipped += 1
                    elif len(self.running) < self.jobs and time.monotonic() < self.until:
                        waiting.remove(cell)
                        self.running.append(self._start(cell))
                if time.monotonic() >= self.until:
                    break
                time.sleep(POLL)
                for ended in self._ended():
                    self._note(ended)
                    if not ended.succeeded:
                        raise self._failure(ended)
        if skipped:
            print(f"{skipped} of {self.total} steps were done before.", flush=True)
        return [cell for cell in planned if cell.name in self.todo]

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
            log_start = output.tell()
            process = subprocess.Popen(
                [*launcher, *tool, *cell.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                start_new_session=True,  # signals reach it through `_stop` alone, and once
                pass_fds=(self.lock,),  # held as long as it runs, should this process be killed
            )
        return Running(cell, process, time.perf_counter(), log_start)

    def _ended(self) -> Iterator[Ended]:
        """What has ended since the last look, with success or without."""
        for entry in list(self.running):
            pid, status, usage = os.wait4(entry.process.pid, os.WNOHANG)
            if pid == 0:
                continue
            self.running.remove(entry)
            entry.process.returncode = code = os.waitstatus_to_exitcode(status)
            kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)  # there it counts bytes
            yield Ended(entry, code, time.perf_counter() - entry.since, kilobytes * 1024 / 1e9)

    def _note(self, ended: Ended) -> None:
        cell, took = ended.entry.cell, {"seconds": ended.seconds, "peak_memory_gb": ended.peak_memory_gb}
        self._tick()
        if not ended.succeeded:
            self.record.note_unfinished(cell, **took)
            return
        self.record.note(cell, **took)
        self.todo.discard(cell.name)
        done, seconds = self.total - len(self.todo), self.record.content["cells"][cell.name]["seconds"]
        print(f"[{done:{len(str(self.total))}}/{self.total}] {cell.name}: {seconds:.0f} s", flush=True)

    def _failure(self, ended: Ended) -> InputError | RunError:
        cell, log, code = ended.entry.cell, self._log(ended.entry.cell), ended.code
        text = log.read_bytes()[ended.entry.log_start :].decode(errors="replace").strip()
        errors = re.findall(r"^error: (.*)$", text, re.MULTILINE)  # ours; what torchrun says follows it
        said = errors[-1] if errors else " ".join(text.splitlines()[-LAST_LINES:]) or "it said nothing"
        if code == 2 or re.search(r"exitcode\s*: 2\b", text):
            return InputError(f"{cell.name}: {said}")
        how = f"ended with exit code {code}" if code else f"left no {cell.done.name}"
        return RunError(f"{cell.name} {how}: {said} (all of it: {log}). The same command goes on from there.")

    def _stop(self) -> None:
        """Ask what runs to stop, and wait for it: trainings write a checkpoint first. What ends with success meanwhile
        is done."""
        # Not SIGINT: what a shell starts in the background ignores it.
        signals, asked = [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL], -math.inf
        while self.running:
            if signals and time.monotonic() - asked > PATIENCE:
                number, asked = signals.pop(0), time.monotonic()
                for entry in self.running:
                    # Not by Popen, which might reap what has just ended. A command tells its processes, if it can.
                    (os.killpg if number == signal.SIGKILL else os.kill)(entry.process.pid, number)
            time.sleep(POLL)
            for ended in self._ended():
                self._note(ended)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self.since = time.perf_counter()
        try:
            yield
        finally:
            self._tick()

    def _tick(self) -> None:
        """Add the time since the last time; a study that is killed then loses that of the steps it was at."""
        now = time.perf_counter()
        self.record.add_seconds(now - self.since)
        self.since = now

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """SIGTERM and SIGHUP are taken like Ctrl-C, and nothing that was started outlives this, however it ends."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._stop()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two studies in one folder would write the same runs; the lock ends with this process and all it started.

        Raises:
            InputError: another one holds it.
        """
        refusal = (
            f"--out {self.folder}: another decovae study, or a command that one left behind, runs there; wait for it, "
            "or end it."
        )
        with locked(self.folder / ".lock", refusal=refusal) as self.lock:
            yield


def script(name: str) -> Path:
    """A script of ``train/``.

    Raises:
        InputError: the package was installed without it.
    """
    path = SCRIPTS / name
    if not path.is_file():
        raise InputError(f"decovae study: {path} is missing; clone the repository and install it with pip install -e .")
    return path

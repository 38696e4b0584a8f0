"""Rows in worker processes that may hang, crash or lose their GPU without taking the campaign along."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bench.campaign.rows import TIME, Row, append, environment, failed, one_line, pytest_command, trim
from bench.processes import ROOT, end
from bench.rows_plugin import CUDA_IS_LOST
from decovae.errors import InputError
from decovae.files import locked

POLL = 0.05
"""Seconds between looks at a worker."""

START = 300.0
"""Seconds that a worker has from its start to its first row, and from its last row to its end."""

OVERTIME = 60.0
"""Seconds that a row which runs at the deadline may go on."""


class Stopped(KeyboardInterrupt):
    """A signal asked the campaign to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """What is known of signals in this process: whether they have to wait, and which one does."""

    wait = False
    waiting: int | None = None


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `Stopped`, once: what follows the first of them has the time to tidy up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        if _Signals.wait:
            _Signals.waiting = number
        else:
            raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """A signal waits for the end of this: a process that has been started is known to whoever has to end it."""
    _Signals.wait = True
    try:
        yield
    finally:
        _Signals.wait = False
        number, _Signals.waiting = _Signals.waiting, None
        if number is not None:
            raise Stopped(number)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[int]:
    """The folder, for one campaign at a time; the descriptor that holds it, for workers to hold it too.

    Raises:
        InputError: another campaign runs in it, or it cannot be written.
    """
    refusal = f"--out {out}: another campaign, or a worker that one left behind, runs there; wait for it, or end it."
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(locked(out / ".lock", refusal=refusal))
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder.") from error
        yield lock


def run_aside(command: Sequence[str], log: Path, *, seconds: float, env: dict[str, str], lock: int) -> str | None:
    """Run one command in a session of its own; why it failed, or None.

    Args:
        command: to run, in the clone.
        log: file that its output is appended to.
        seconds: after which it is ended.
        env: its environment.
        lock: descriptor of the folder's lock.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("ab") as output, undivided():
            start = output.tell()
            process = _start(command, output.fileno(), ROOT, env, lock)
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"took longer than {seconds:g} s"
    finally:
        if process is not None:
            end(process)
    return None if code == 0 else f"{_death(code)}: {_last_line(log, start)}"


def _start(
    command: Sequence[str], output: int, folder: Path, env: dict[str, str], lock: int
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # signals reach it through the campaign alone
        pass_fds=(lock,),  # held as long as it runs, should the campaign be killed
    )


def _death(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        return f"the process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"the process was killed by signal {-code}"


def _last_line(log: Path, start: int) -> str:
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    return one_line(lines[-1]) if lines else "it said nothing"


@dataclass
class Worker:
    """One process that runs rows, and what is known of it.

    Attributes:
        process: it.
        offset: in the file of rows, behind the last line that was read.
        ended: rows that have.
        row: the one that runs.
        since: when that began, or the last one ended.
    """

    process: subprocess.Popen[bytes]
    offset: int
    ended: list[Row] = field(default_factory=list)
    row: str | None = None
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs rows, and writes what became of them.

    Args:
        out: folder of the campaign; rows go to ``rows.jsonl`` in it, what workers say to ``logs``.
        scale: of the rows.
        deadline: seconds since 1970 after which no row begins.
        lock: descriptor of the folder's lock.
        report: told of each row as it ends.
        root: pytest's root.
    """

    def __init__(
        self, out: Path, *, scale: str, deadline: float, lock: int, report: Callable[[Row], None], root: Path = ROOT
    ) -> None:
        self.rows, self.logs = out / "rows.jsonl", out / "logs"
        self.scale, self.deadline, self.lock, self.report, self.root = scale, deadline, lock, report, root

    def run(self, name: str, ids: Sequence[str], *, seconds: float) -> None:
        """Run rows one after the other, in as many workers as it takes; returns when all have ended or time is up.

        Args:
            name: of the log.
            ids: of the rows.
            seconds: that a row may take; then it is ended, and has failed.

        Raises:
            Stopped: by a signal; the row that ran is to be run again.
        """
        todo = list(ids)
        while todo and time.time() < self.deadline:
            ended, complaint = self._worker(name, todo, seconds)
            for row in [] if ended or time.time() >= self.deadline else todo:
                self._end(failed(row, f"no row began: {complaint}"), ended)
            gone = {row.id for row in ended}
            todo = [row for row in todo if row not in gone]

    def _worker(self, name: str, ids: Sequence[str], seconds: float) -> tuple[list[Row], str]:
        """One worker's rows that have ended, and how it ended."""
        self.logs.mkdir(parents=True, exist_ok=True)
        trim(self.rows)
        log = self.logs / f"{name}.log"
        with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
            wanted = Path(folder) / "rows.txt"
            wanted.write_text("".join(f"{row}\n" for row in ids), encoding="utf-8")
            suites = list(dict.fromkeys(row.partition("::")[0] for row in ids))
            command = pytest_command(suites, self.rows, "--rows", str(wanted), "--deadline", str(self.deadline))
            offset = self.rows.stat().st_size if self.rows.exists() else 0
            log_start = output.tell()
            worker: Worker | None = None
            try:
                with undivided():
                    process = _start(command, output.fileno(), self.root, environment(self.scale), self.lock)
                    worker = Worker(process, offset)
                complaint = self._watch(worker, seconds)
            except BaseException:
                if worker is not None:
                    end(worker.process)
                    self._read(worker)
                    self._stop_row(worker)
                raise
            end(worker.process)
        self._read(worker)
        code: int | None = worker.process.returncode
        if complaint is None and (worker.row is not None or code not in (None, 0, CUDA_IS_LOST)):
            complaint = "the process could not be ended" if code is None else _death(code)
        if worker.row is not None and complaint is not None:
            self._end(failed(worker.row, complaint), worker.ended)
        return worker.ended, f"{complaint or 'the process ended'}, {_last_line(log, log_start)}"

    def _watch(self, worker: Worker, seconds: float) -> str | None:
        """Follow a worker until it ends or has to be ended: why, if that is the fault of what it does."""
        while worker.process.poll() is None:
            self._read(worker)
            waited = time.monotonic() - worker.since
            if waited > (START if worker.row is None else seconds):
                self._ask_where(worker.process)
                end(worker.process, politely=False)
                self._read(worker)
                return f"took longer than {seconds:g} s" if worker.row is not None else "it took too long to begin"
            if time.time() > self.deadline + OVERTIME:
                end(worker.process)
                self._read(worker)
                self._stop_row(worker, TIME)
                return None
            time.sleep(POLL)
        return None

    def _ask_where(self, process: subprocess.Popen[bytes]) -> None:
        """Have a worker that hangs write to its log where it is."""
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)

    def _read(self, worker: Worker) -> None:
        """What a worker has written since the last look."""
        for row, offset in _lines_from(self.rows, worker.offset):
            worker.offset, worker.since = offset, time.monotonic()
            worker.row = row.id if row.outcome == "started" else None
            if row.outcome not in ("started", "stopped"):
                worker.ended.append(row)
                self.report(row)

    def _end(self, row: Row, ended: list[Row]) -> None:
        trim(self.rows)
        append(self.rows, row)
        ended.append(row)
        self.report(row)

    def _stop_row(self, worker: Worker, reason: str | None = None) -> None:
        """Take the row that ran back: it is not, or not yet, its fault that it did not end."""
        if worker.row is not None:
            trim(self.rows)
            seconds = round(time.monotonic() - worker.since, 1)
            append(self.rows, Row(worker.row, "stopped", reason, finished=time.time(), seconds=seconds))
            worker.row = None


def _lines_from(path: Path, offset: int) -> Iterator[tuple[Row, int]]:
    """Whole lines of the file from a place on, each with the place behind it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield Row.from_dict(json.loads(line)), offset

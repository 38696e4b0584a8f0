"""What every process of a run is at, so that one that hangs is named and ends the run that waits for it."""

from __future__ import annotations

import faulthandler
import itertools
import json
import multiprocessing
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from decovae.runtime import Runtime

INTERVAL = 5.0
"""Seconds between two looks at the other processes."""

STORE_WAIT = timedelta(seconds=30)
"""How long an answer of the rendezvous store is waited for."""

MISSED = 4
"""Intervals without a word after which a process is said not to answer."""

VERDICT = "verdict"


@dataclass(frozen=True)
class Report:
    """What one process tells the others: who it is, what it is at, and since when."""

    rank: int
    node: str
    pid: int
    place: str
    step: int | None
    count: int
    age: float
    patience: float | None
    beat: int
    ended: bool = False

    @property
    def where(self) -> str:
        """For example: in "backward of autoencoder" of step 12."""
        return f'in "{self.place}"' + ("" if self.step is None else f" of step {self.step}")


class Watch:
    """Ends a run in which nobody gets on any more, and says who holds it up. Every process has one::

        with Watch(runtime, timeout=600.0) as watch:
            watch.at("backward of autoencoder", step=12)

    A process tells the others now and then where it is, through the rendezvous store: collectives are what hangs. When
    no process has passed a place for ``timeout`` seconds, the one that has passed the fewest is behind. It prints its
    Python stacks, the block that names it is printed once, and all processes end with exit code 1, so that torchrun
    starts them again. Places are counted: pass the same ones in the same order on every process.

    Args:
        runtime: of this process; a run of one process is watched without a store.
        timeout: seconds without progress.
    """

    def __init__(self, runtime: Runtime, timeout: float) -> None:
        self._runtime, self._timeout = runtime, timeout
        self._interval = min(INTERVAL, timeout / 8)
        self._counter = itertools.count(1)
        self._place: tuple[str, int | None, float | None, int, float] = ("the start", None, None, 0, time.monotonic())
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, float] = {}
        # Seconds that this process was awake: after Ctrl-Z and fg nothing hangs.
        self._awake = 0.0
        self._moved = 0.0
        self._proposed: str | None = None
        self._verdict: str | None = None
        self._ending: str | None = None
        self._left = threading.Event()
        self._threads: list[threading.Thread] = []

    def at(self, place: str, *, step: int | None = None, patience: float | None = None) -> None:
        """Note what this process does from now on. Costs about a microsecond; the same place again is progress too.

        Args:
            place: in words that tell a reader where to look.
            step: it belongs to.
            patience: seconds that it may take, where that is not ``timeout``; all processes then wait as long.
        """
        self._place = (place, step, patience, next(self._counter), time.monotonic())

    def __enter__(self) -> Watch:
        loops = [self._judge]
        if self._runtime.group is not None:
            # A name of its own: a store may outlive processes that are started again. A connection of its own: that of
            # the main thread may be waiting for an answer.
            own = (uuid.uuid4().hex, self._report(0))
            gathered = self._runtime.gather(own)
            name = gathered[0][0]
            self._reports = {report.rank: report for _, report in gathered if report.rank != self._runtime.rank}
            self._heard = dict.fromkeys(self._reports, 0.0)
            store = dist.distributed_c10d._get_default_store().clone()
            store.set_timeout(STORE_WAIT)
            self._store = dist.distributed_c10d.PrefixStore(f"watch/{name}", store)
            loops.append(self._talk)
        self._moved = self._awake
        self._threads = [threading.Thread(target=loop, name="decovae-watch", daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = "the end" if kind is None else f"the end, after {kind.__name__}"
        self._left.set()
        for thread in self._threads:
            thread.join(2 * self._interval)  # a store that is gone does not hold up the end

    def _report(self, beat: int) -> Report:
        place, step, patience, count, since = self._place
        ended = self._ending is not None
        return Report(
            rank=self._runtime.rank,
            node=socket.gethostname(),
            pid=os.getpid(),
            place=self._ending or place,
            step=None if ended else step,
            count=count,
            age=time.monotonic() - since,
            patience=None if ended else patience,
            beat=beat,
            ended=ended,
        )

    def _talk(self) -> None:
        """Tell the store what this process is at, and learn what the others are at."""
        present: list[int] = []
        for beat in itertools.count(1):
            leaves = self._left.is_set()
            try:
                self._store.set(str(self._runtime.rank), json.dumps(asdict(self._report(beat))))
                if not leaves:
                    absent = {*range(self._runtime.world)} - {self._runtime.rank, *present}
                    present += [rank for rank in sorted(absent) if self._store.check([str(rank)])]
                    self._listen(present)
                    self._agree()
            except (RuntimeError, ValueError):  # unreachable, or half gone: the others are then not heard of any more
                pass
            if leaves:
                return
            self._left.wait(self._interval)

    def _listen(self, ranks: list[int]) -> None:
        for text in self._store.multi_get([str(rank) for rank in ranks]) if ranks else []:
            report = Report(**json.loads(text))
            before = self._reports[report.rank]
            if report.beat != before.beat:
                self._heard[report.rank] = self._awake
            if (report.count, report.ended) != (before.count, before.ended):
                self._moved = self._awake
            self._reports[report.rank] = report

    def _agree(self) -> None:
        """All processes take the verdict that was there first."""
        if self._proposed is not None:
            self._verdict = self._store.compare_set(VERDICT, "", self._proposed).decode()
        elif self._store.check([VERDICT]):
            self._verdict = self._store.get(VERDICT).decode()

    def _judge(self) -> None:
        """Count the time without progress, and end this process when it is too long."""
        before, count = time.monotonic(), -1
        while not self._left.wait(self._interval):
            now = time.monotonic()
            self._awake += min(now - before, 2 * self._interval)
            before = now
            if self._place[3] != count:
                count = self._place[3]
                self._moved = self._awake
            own = self._report(0)
            reports = {**self._reports, own.rank: own}
            limit = max(self._timeout if report.patience is None else report.patience for report in reports.values())
            if self._verdict is not None or self._awake - self._moved > limit:
                self._end(reports)

    def _end(self, reports: Mapping[int, Report]) -> NoReturn:
        rank = self._runtime.rank
        silent = [other for other, heard in self._heard.items() if self._awake - heard > MISSED * self._interval]
        since = {other: self._awake - heard for other, heard in self._heard.items()}
        behind = _behind(reports, silent)
        own = json.dumps({"by": rank, "behind": behind, "text": _block(reports, behind, silent, since)})
        if self._runtime.world > 1 and self._verdict is None:
            self._proposed = own
            deadline = time.monotonic() + 3 * self._interval
            while self._verdict is None and time.monotonic() < deadline:
                time.sleep(self._interval / 4)
        verdict = json.loads(self._verdict or own)
        text: str = verdict["text"]
        if verdict["by"] != rank:
            first = text.splitlines()[1].strip()
            text = f"error of process {rank}: ends, since the run hangs: {first}"
        os.write(2, f"\n{text}\n".encode())
        if rank in verdict["behind"]:
            os.write(2, f"Stacks of process {rank}:\n".encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
        # The others may have to read the verdict from a store that lives in this process.
        time.sleep(3 * self._interval if self._runtime.world > 1 else 0)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)


def _behind(reports: Mapping[int, Report], silent: Iterable[int]) -> list[int]:
    """The ranks that the others wait for: those that ended or do not answer, else those that passed fewest places."""
    gone = sorted({rank for rank, report in reports.items() if report.ended} | {*silent})
    if gone:
        return gone
    fewest = min(report.count for report in reports.values())
    return sorted(rank for rank, report in reports.items() if report.count == fewest)


def _block(reports: Mapping[int, Report], behind: list[int], silent: Iterable[int], since: Mapping[int, float]) -> str:
    """What is printed: who is behind and where, where the others wait, what happens now.

    Args:
        reports: of every process.
        behind: ranks that the others wait for.
        silent: ranks that do not answer.
        since: seconds since each was heard of; none for the writer itself.
    """
    seconds = {rank: report.age + since.get(rank, 0.0) for rank, report in reports.items()}
    waiting = [report for rank, report in reports.items() if rank not in behind]
    still = min((seconds[report.rank] for report in waiting or reports.values()), default=0.0)
    lines = [f"error: the run hangs: no process has got on for {still:.0f} s."]
    for rank in behind:
        report = reports[rank]
        who = f"process {rank} (node {report.node}, pid {report.pid})"
        if report.ended:
            lines.append(f"  {who} has left the run, at {report.place}.")
        elif rank in {*silent}:
            lines.append(
                f"  {who} has not answered for {since[rank]:.0f} s; it was {report.where} for {report.age:.0f} s. It "
                "is stopped, or its node or the network is gone."
            )
        else:
            what = "is behind" if waiting else "stands still"
            lines.append(f"  {who} {what}: {report.where} for {seconds[rank]:.0f} s; it prints its stacks.")
    for where, group in itertools.groupby(sorted(waiting, key=lambda r: (r.where, r.rank)), key=lambda r: r.where):
        ranks = [report.rank for report in group]
        many = "processes" if len(ranks) > 1 else "process"
        wait = "wait" if len(ranks) > 1 else "waits"
        lines.append(f"  {many} {', '.join(map(str, ranks))} {wait} {where} for {seconds[ranks[0]]:.0f} s.")
    lines.append(
        "All processes end with exit code 1; started again, the run continues from its last checkpoint (torchrun "
        "--max-restarts does so by itself). --parallel.timeout sets how long is waited."
    )
    return "\n".join(lines)

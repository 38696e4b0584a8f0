"""Measure everything on the machine at hand, most important first: `python -m bench.campaign`.

    python -m bench.campaign [--minutes N] [--out DIR] [--scale gpu|cpu|tiny] [--only CHAPTER …] [--sanitize] [--fresh]
    python -m bench.campaign report FOLDER …     the table and the plots again, from what was measured
    python -m bench.campaign predict             what two cards would take, from counts; needs none

It describes the machine, measures its ceilings, runs the tests marked `gpu`, and then every benchmark, in chapters of
decreasing importance, until the minutes are over. Each row is written as it ends, to rows.jsonl; campaign.json after
each chapter; the plots and the table, campaign.md, now and then and at the end. A row that hangs, crashes or loses the
GPU costs that row alone. The same command goes on where one was stopped, by a signal or for time; what failed is tried
again, after the rest. Exit code 1: a row or a check has failed; 2: a wrong option; 130 or 143: stopped by a signal.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, get_args

from bench import units
from bench.campaign import plan, record, supervise
from bench.campaign.plan import CHAPTERS, Chapter
from bench.campaign.record import Campaign
from bench.campaign.rows import ROOT, Row, collect_rows, environment, one_line, read_rows, trim
from decovae.errors import InputError, RunError

CEILINGS_SECONDS = 240.0
DESCRIBE_SECONDS = 120.0

PAGES_SECONDS = 60.0
"""Between two drawings of what is there so far, at least."""

DONE = ("measured", "skipped")
"""Outcomes that are not tried again."""


Checks = Mapping[str, Callable[[Path, float], dict[str, Any]]]
"""What can be checked beside rows, by the names in `Campaign.checks`: from folder and deadline to what was found."""


def _tests(out: Path, deadline: float) -> dict[str, Any]:
    from bench.campaign.checks import run_tests

    return run_tests(out / "logs", deadline)


def _cold_start(out: Path, deadline: float) -> dict[str, Any]:
    from bench import cold_start

    return cold_start.measure(deadline)


def _sanitizer(out: Path, deadline: float) -> dict[str, Any]:
    from bench import sanitize

    return sanitize.run(deadline)


@dataclass(frozen=True)
class Suites:
    """What there is to measure.

    Attributes:
        root: of pytest, which ids of rows are relative to.
        folder: of the suites, below it.
        chapters: that take the rows.
        checks: what is checked beside them.
    """

    root: Path = ROOT
    folder: str = "bench"
    chapters: tuple[Chapter, ...] = CHAPTERS
    checks: Checks = field(
        default_factory=lambda: {"tests": _tests, "cold_start": _cold_start, "sanitizer": _sanitizer}
    )


@dataclass
class Progress:
    """Rows that have ended, of all that are to be run; prints a line for each."""

    total: int
    done: int

    def __call__(self, row: Row) -> None:
        self.done += 1
        width = len(str(self.total))
        print(f"[{self.done:{width}}/{self.total}] {row.id.partition('::')[2]}: {result(row)}", flush=True)


def result(row: Row) -> str:
    """What became of a row, in a few words."""
    if row.stats is not None:
        return units.seconds(row.stats["median"])
    return row.outcome if row.reason is None else f"{row.outcome}: {row.reason}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a run.

    Raises:
        InputError: an unknown option or an unusable value.
        SystemExit: after printing ``--help``.
    """
    from bench.scale import Scale

    parser = _Parser(
        prog="python -m bench.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, default=60.0, help="after which nothing new begins (60)")
    parser.add_argument(
        "--out", type=Path, help="folder (bench/results/campaign-GPU; at other scales than gpu runs/campaign-SCALE)"
    )
    parser.add_argument("--scale", choices=get_args(Scale), help="sizes (gpu with CUDA, else tiny)")
    names = [chapter.name for chapter in CHAPTERS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHAPTER", help=", ".join(names))
    parser.add_argument("--sanitize", action="store_true", help="run every kernel under compute-sanitizer too")
    parser.add_argument("--fresh", action="store_true", help="forget what the folder has")
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return minutes


def describe() -> dict[str, Any]:
    """`decovae.machine.describe` of a process that ends: a context of this one would take the rows' memory.

    Raises:
        RunError: it failed.
    """
    try:
        process = subprocess.run(
            [sys.executable, "-m", "decovae.machine"],
            cwd=ROOT,
            env=environment("tiny"),
            capture_output=True,
            text=True,
            timeout=DESCRIBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"python -m decovae.machine: took longer than {DESCRIBE_SECONDS:g} s.") from None
    if process.returncode:
        raise RunError(f"python -m decovae.machine: {(process.stderr.strip().splitlines() or ['failed'])[-1]}.")
    return dict(json.loads(process.stdout.splitlines()[-1]))


def default_out(scale: str, machine: dict[str, Any]) -> Path:
    """Where a campaign goes if nobody says."""
    if "gpu" not in machine or scale != "gpu":
        return ROOT / "runs" / f"campaign-{scale}"
    name = re.sub(r"\b(nvidia|geforce)\b", "", str(machine["gpu"]).lower())
    return ROOT / "bench" / "results" / f"campaign-{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}"


class Run:
    """One session of a campaign.

    Args:
        out: its folder.
        campaign: what is there.
        minutes: for this session.
        lock: descriptor of the folder's lock.
        suites: what there is to measure.
    """

    def __init__(self, out: Path, campaign: Campaign, *, minutes: float, lock: int, suites: Suites) -> None:
        self.out, self.campaign, self.minutes, self.lock, self.suites = out, campaign, minutes, lock, suites
        self.began = self.noted = self.drawn = time.time()
        self.ids: list[str] = []
        self.complaints: list[str] = []

    def at(self, share: float) -> float:
        """When a share of the minutes is over, in seconds since 1970."""
        return self.began + 60 * self.minutes * share

    def measure(self, only: Sequence[str] | None, *, checks: Checks, sanitize: bool) -> None:
        """Everything that is not there yet, until time is up.

        Args:
            only: names of chapters; then nothing is checked but by the sanitizer.
            checks: what can be.
            sanitize: whether to, with compute-sanitizer.

        Raises:
            RunError: there are no rows.
            Stopped: by a signal.
        """
        self.write()
        if self.campaign.ceilings is None:
            self.campaign.ceilings = self._ceilings()
        wanted = {name: check for name, check in checks.items() if (sanitize if name == "sanitizer" else only is None)}
        new = self.campaign.checks["tests"] is None
        if new:
            self._check("tests", wanted, self.at(plan.CHECKS_SHARE))
        self.ids = collect_rows(self.campaign.scale, root=self.suites.root, suites=self.suites.folder)
        sanitizer = self.at(1 - plan.SANITIZER_SHARE * ("sanitizer" in wanted))
        self._rows(only, sanitizer - 60 * self.minutes * plan.COLD_START_SHARE * ("cold_start" in wanted))
        self._check("cold_start", wanted, sanitizer)
        self._check("sanitizer", wanted, self.at(1))
        if not new and time.time() < self.at(1 - plan.CHECKS_SHARE):
            self._check("tests", wanted, self.at(1))  # they had no time before, or failed: not again at the rows' cost

    def _ceilings(self) -> dict[str, Any] | None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ceilings.json"
            complaint = supervise.run_aside(
                [sys.executable, "-m", "bench.campaign.ceilings", "--out", str(file)],
                self.out / "logs" / "ceilings.log",
                seconds=CEILINGS_SECONDS,
                env=environment(self.campaign.scale),
                lock=self.lock,
            )
            if complaint is not None:
                self._complain(f"ceilings: {complaint}")
                return None
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        print(f"ceilings: a copy moves {found['copy_bytes_per_second'] / 1e9:.0f} GB/s", flush=True)
        return found

    def _check(self, name: str, checks: Checks, deadline: float) -> None:
        """A check that is wanted and has not got through yet; nothing that it does ends the campaign."""
        before = self.campaign.checks.get(name)
        if name not in checks or (before is not None and complete(before) and not errors(before)):
            return
        try:
            found = checks[name](self.out, deadline)
        except Exception as error:  # whatever a check stumbles over, the rows are to be measured
            self._complain(f"{name}: {one_line(str(error)) or type(error).__name__}")
            return
        self.campaign.checks[name] = found
        if errors(found):
            self._complain(f"{name}: {errors(found)} failed, see {record.FILE}")
        self.write()

    def _rows(self, only: Sequence[str] | None, deadline: float) -> None:
        sorted_rows = plan.sort(self.ids, self.suites.chapters)
        chapters = [chapter for chapter in self.suites.chapters if only is None or chapter.name in only]
        known = {row.id: row for row in self.campaign.rows}
        done = {row for row in known if known[row].outcome in DONE}
        wanted = [row for chapter in chapters for row in sorted_rows[chapter.name]]
        there = len(done.intersection(wanted))
        if there:
            print(f"{there} of {len(wanted)} rows are there already", flush=True)
        progress = Progress(len(wanted), there)
        supervisor = supervise.Supervisor(
            self.out,
            scale=self.campaign.scale,
            deadline=deadline,
            lock=self.lock,
            report=progress,
            root=self.suites.root,
        )
        # What failed before comes after what nobody has tried: it may hang again.
        for again in (False, True):
            for chapter in chapters:
                todo = [row for row in sorted_rows[chapter.name] if row not in done and (row in known) == again]
                if todo and time.time() < deadline:
                    seconds = chapter.seconds * plan.PATIENCE[self.campaign.scale]
                    supervisor.run(chapter.name, todo, seconds=seconds)
                    self.write()

    def _complain(self, sentence: str) -> None:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
        self.complaints.append(sentence)

    def write(self, *, end: bool = False) -> None:
        """What is there by now: the record, and of it the plots and the table if it is the end, or has been a while."""
        now = time.time()
        self.campaign.seconds, self.noted = round(self.campaign.seconds + now - self.noted, 1), now
        rows = {row.id: row for row in read_rows(self.out / record.ROWS)}
        order = self.ids or [*rows, *self.campaign.not_reached]
        self.campaign.rows = [rows[row] for row in order if row in rows]
        self.campaign.not_reached = [row for row in order if row not in rows]
        self.campaign.save(self.out / record.FILE)
        if not self.campaign.rows or not (end or now - self.drawn > PAGES_SECONDS):
            return
        self.drawn = now
        from bench.campaign import plots, table

        self._page("plots", lambda: plots.write(self.out, self.campaign))
        self._page("table", lambda: table.write(self.out, self.campaign))  # shows the plots that are there

    def _page(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a page that cannot be drawn must not end what measures for an hour
            self._complain(f"{name}: cannot be written ({type(error).__name__}: {one_line(str(error))})")


def errors(check: Mapping[str, Any]) -> int:
    """How many errors a check found, all its tools together."""
    found = int(check.get("failed") or 0) + int(check.get("errors") or 0)
    return found + sum(errors(tool) for tool in check.get("tools", {}).values())


def complete(check: Mapping[str, Any]) -> bool:
    """Whether a check could be made, and came to its end."""
    tools = check.get("tools", {}).values()
    ended = check.get("available", True) and check.get("complete", True) and not check.get("left_out")
    return bool(ended) and all(map(complete, tools))


def run(arguments: argparse.Namespace, *, suites: Suites | None = None, machine: dict[str, Any] | None = None) -> int:
    """A campaign, or the rest of one; its exit code.

    Args:
        arguments: of `parse`.
        suites: what there is to measure; by default this project's.
        machine: the one at hand; found out by default.

    Raises:
        InputError: the folder holds another machine's campaign, or is in use.
        RunError: nothing can be measured.
    """
    with supervise.stopping():
        machine = machine or describe()
        scale = arguments.scale or ("gpu" if "gpu" in machine else "tiny")
        out = arguments.out or default_out(scale, machine)
        with supervise.alone(out) as lock:
            trim(out / record.ROWS)
            campaign = record.begin(out, scale=scale, machine=machine, commit=record.commit(), fresh=arguments.fresh)
            session = Run(out, campaign, minutes=arguments.minutes, lock=lock, suites=suites or Suites())
            try:
                session.measure(arguments.only, checks=session.suites.checks, sanitize=arguments.sanitize)
                session.write(end=True)
            except supervise.Stopped as stop:
                session.write(end=True)
                print(f"stopped: {_state(session)}; the same command goes on.", file=sys.stderr)
                return 128 + stop.number
    bad = [row for row in campaign.rows if row.outcome == "failed"]
    print(f"{out}: {_state(session)}{'; the same command goes on' if campaign.not_reached else ''}.")
    for row in bad:
        print(f"failed: {row.id}: {row.reason}")
    return 1 if bad or session.complaints else 0


def _state(session: Run) -> str:
    rows = session.campaign.rows
    counts = {name: sum(row.outcome == name for row in rows) for name in ("measured", "skipped", "failed")}
    parts = [f"{count} {name}" for name, count in counts.items()]
    return f"rows: {', '.join(parts)}, {len(session.campaign.not_reached)} not reached"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] == "predict":
            from bench.campaign import predict

            return predict.main(arguments[1:])
        if arguments and arguments[0] == "report":
            from bench.campaign import table

            return table.main(arguments[1:])
        return run(parse(arguments))
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except supervise.Stopped as stop:  # before there was a folder to write to
        return 128 + stop.number


if __name__ == "__main__":
    sys.exit(main())

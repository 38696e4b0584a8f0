"""Measure everything on the machine at hand, most important first: `python -m bench.campaign`.

    python -m bench.campaign [--minutes N] [--out DIR] [--scale gpu|cpu|tiny] [--only CHAPTER …] [--sanitize] [--fresh]
    python -m bench.campaign report FOLDER …     the table and the plots again, from what was measured
    python -m bench.campaign predict             what two cards would take, from counts; needs none

It describes the machine, measures its ceilings, and runs every kernel once against float64. Then come the benchmarks,
in chapters of decreasing importance until the minutes are over, and between them, each for a share of the minutes at
most, the tests that use a GPU (behind the first chapters), cold starts and compute-sanitizer (at the end); rows get
what these leave. Each row is written as it ends, to rows.jsonl; campaign.json after each chapter; the plots and the
table, campaign.md, now and then and at the end. A row that hangs, crashes or loses the GPU costs that row alone.

The same command goes on where one was stopped, by a signal or for time, in rows and in checks. What was never tried
comes first, then rows that time stopped once (twice is a failure), then what failed, and what was skipped for another
reason than that it does not fit: either it takes no time, or what was missing is there by now. Rows are measured again
where the code, or the version of a package that they were measured with, has changed. Exit code 1: a row or a check has
failed; 2: a wrong option; 130 or 143: stopped by a signal.
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
from bench.campaign.rows import Row, collect_rows, environment, one_line, read_rows, read_stopped, trim
from bench.processes import ROOT
from decovae.errors import InputError, RunError

CEILINGS_SECONDS = 240.0
DESCRIBE_SECONDS = 120.0

PAGES_SECONDS = 60.0
"""Between two drawings of what is there so far, at least."""

DOES_NOT_FIT = "does not fit"
"""How the reason of a row begins that was skipped because of this machine's memory."""

Found = dict[str, Any]
"""What a check found."""


def _tour(out: Path, deadline: float, before: Found | None) -> Found:
    from bench.campaign.checks import run_tour

    return run_tour(out / "logs", deadline)


def _tests(out: Path, deadline: float, before: Found | None) -> Found:
    from bench.campaign.checks import run_tests

    return run_tests(out / "logs", deadline, before)


def _cold_start(out: Path, deadline: float, before: Found | None) -> Found:
    from bench import cold_start

    return cold_start.measure(deadline, before=before)


def _sanitizer(out: Path, deadline: float, before: Found | None) -> Found:
    from bench import sanitize

    return sanitize.run(deadline, before=before)


def _no_sanitizer() -> str | None:
    from bench import sanitize

    return sanitize.missing()


@dataclass(frozen=True)
class Check:
    """Something to find out beside rows.

    Attributes:
        run: from the campaign's folder, a deadline and what was found before, to what is found now, all together.
        missing: why it cannot be made here, which it says by itself; None if it can.
    """

    run: Callable[[Path, float, Found | None], Found]
    missing: Callable[[], str | None] = lambda: None


Checks = Mapping[str, Check]
"""By the names in `Campaign.checks`, and in `plan.SHARES`."""


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
        default_factory=lambda: {
            "tour": Check(_tour),
            "tests": Check(_tests),
            "cold_start": Check(_cold_start),
            "sanitizer": Check(_sanitizer, _no_sanitizer),
        }
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
        self.progress = Progress(0, 0)
        self.tried: set[str] = set()
        self.checked: set[str] = set()

    @property
    def end(self) -> float:
        """When the minutes are over, in seconds since 1970."""
        return self.began + 60 * self.minutes

    def seconds_for(self, name: str, wanted: Checks) -> float:
        """What a check is to have, or kept for it; 0 for one that is not to be made, or cannot be, or has been."""
        if name not in wanted or self._done(name) or wanted[name].missing() is not None:
            return 0.0
        return 60 * self.minutes * plan.SHARES[name]

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
        self._check("tour", wanted, time.time() + self.seconds_for("tour", wanted))
        self.ids = collect_rows(self.campaign.scale, root=self.suites.root, suites=self.suites.folder)
        chapters = [chapter for chapter in self.suites.chapters if only is None or chapter.name in only]
        sanitizer = self.end - self.seconds_for("sanitizer", wanted)
        last = sanitizer - self.seconds_for("cold_start", wanted)
        tests = self.seconds_for("tests", wanted)
        self.progress = self._progress(chapters)
        self._rows([chapter for chapter in chapters if chapter.first], last - tests, passes=1)
        self._check("tests", wanted, min(time.time() + tests, last))
        self._rows(chapters, last)
        self._check("cold_start", wanted, sanitizer)
        self._check("sanitizer", wanted, self.end)
        self._rows(chapters, self.end)
        for name in ("tour", "tests"):  # what went wrong in an earlier session, if there is time for all of it again
            if name in wanted and name not in self.checked and errors(self.campaign.checks.get(name) or {}):
                seconds = 60 * self.minutes * plan.SHARES[name]
                if time.time() + seconds < self.end:
                    self._check(name, wanted, time.time() + seconds, again=True)

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

    def _done(self, name: str) -> bool:
        before = self.campaign.checks.get(name)
        return before is not None and complete(before)

    def _check(self, name: str, checks: Checks, deadline: float, *, again: bool = False) -> None:
        """A check that is wanted and has not got through yet; nothing that it does ends the campaign."""
        if name not in checks or (self._done(name) and not again):
            return
        if time.time() >= deadline and checks[name].missing() is None:
            return
        self.checked.add(name)
        before = self.campaign.checks.get(name)
        try:
            found = checks[name].run(self.out, deadline, before)
        except Exception as error:  # whatever a check stumbles over, the rows are to be measured
            self._complain(f"{name}: {one_line(str(error)) or type(error).__name__}")
            return
        if before is None or not _worse(found, before):
            self.campaign.checks[name] = found
        if errors(found):
            self._complain(f"{name}: {errors(found)} failed, see {record.FILE}")
        else:
            print(f"{name}: {'done' if complete(found) else found.get('reason') or 'not complete'}", flush=True)
        self.write()

    def _rows(self, chapters: Sequence[Chapter], deadline: float, passes: int = 3) -> None:
        """Rows until the deadline: those never tried, those stopped for time, those to try again, `passes` of these."""
        sorted_rows = plan.sort(self.ids, self.suites.chapters)
        supervisor = supervise.Supervisor(
            self.out,
            scale=self.campaign.scale,
            deadline=deadline,
            lock=self.lock,
            report=self.progress,
            root=self.suites.root,
        )
        for number in range(passes):
            known, stopped = self._known(), read_stopped(self.out / record.ROWS)
            for chapter in chapters:
                rows = [row for row in sorted_rows[chapter.name] if row not in known and row not in stopped]
                if number == 1:  # it may need more time than a session has
                    rows = [row for row in sorted_rows[chapter.name] if row in stopped and row not in known]
                if number == 2:  # it may hang again
                    rows = [row for row in sorted_rows[chapter.name] if row in known and not done(known[row])]
                    rows = [row for row in rows if row not in self.tried]
                if rows and time.time() < deadline:
                    seconds = chapter.seconds * plan.PATIENCE[self.campaign.scale]
                    supervisor.run(chapter.name, rows, seconds=seconds)
                    self.tried.update(set(rows).intersection(self._known()))
                    self.write()

    def _known(self) -> dict[str, Row]:
        return {row.id: row for row in read_rows(self.out / record.ROWS)}

    def _progress(self, chapters: Sequence[Chapter]) -> Progress:
        known, sorted_rows = self._known(), plan.sort(self.ids, self.suites.chapters)
        rows = [row for chapter in chapters for row in sorted_rows[chapter.name]]
        there = sum(row in known and done(known[row]) for row in rows)
        if there:
            print(f"{there} of {len(rows)} rows are there already", flush=True)
        return Progress(len(rows), there)

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


def done(row: Row) -> bool:
    """Whether a row is not to be tried again: what failed is, and what was skipped for want of something but memory."""
    return row.outcome != "failed" and (row.outcome != "skipped" or (row.reason or "").startswith(DOES_NOT_FIT))


def _worse(found: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a check got less far than an earlier time."""
    return (complete(found), found.get("passed", 0)) < (complete(before), before.get("passed", 0))


def errors(check: Mapping[str, Any]) -> int:
    """How many errors a check found, all its tools together."""
    found = int(check.get("failed") or 0) + int(check.get("errors") or 0)
    return found + sum(errors(tool) for tool in check.get("tools", {}).values())


def complete(check: Mapping[str, Any]) -> bool:
    """Whether a check could be made, and came to its end."""
    tools = check.get("tools", {}).values()
    ended = check.get("available", True) and check.get("complete", True) and not check.get("left_out")
    ended = ended and not check.get("not_reached")
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
    wrong = [name for name, check in campaign.checks.items() if check and errors(check)]
    return 1 if bad or wrong or session.complaints else 0


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

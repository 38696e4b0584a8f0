"""A campaign keeps its order and its time, and loses nothing to rows that hang or crash, to a lost GPU, to signals."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import processes
from bench.campaign import plan, record, supervise
from bench.campaign.__main__ import Check, Run, Suites, default_out, main, parse, result, run
from bench.campaign.plan import CHAPTERS, Chapter
from bench.campaign.record import Campaign
from bench.campaign.rows import TIME, Row, append, collect_rows, environment, read_lines, read_rows
from bench.campaign.supervise import Supervisor
from decovae.errors import InputError

SUITE = """
import os, signal, subprocess, sys, time
from pathlib import Path

here = Path(__file__).parent

def timed(benchmark):
    benchmark.pedantic(lambda: None, rounds=2)
    benchmark.extra_info["process"] = os.getpid()

def test_first(benchmark):
    timed(benchmark)

def test_exit():
    os._exit(3)

def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def test_lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_hang():
    # A child in a session of its own, as compilers' helpers are.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    (here / "child").write_text(str(child.pid))
    time.sleep(100)

def test_last(benchmark):
    timed(benchmark)
"""

MACHINE = {"system": "Linux", "processor": "a processor", "torch_threads": 1, "torch": "2", "triton": None}
COMMIT = {"id": "0123456789", "dirty": False, "sources": "of these tests"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "suite"
    (folder / "rows").mkdir(parents=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "rows" / "test_some.py").write_text(SUITE)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def lock(out: Path) -> Any:
    with supervise.alone(out) as descriptor:
        yield descriptor


def ids(*names: str) -> list[str]:
    return [f"rows/test_some.py::test_{name}" for name in names]


def names(rows: list[Row]) -> list[str]:
    return [row.id.partition("::test_")[2] for row in rows]


def supervisor(out: Path, root: Path, lock: int, *, seconds: float = 600) -> tuple[Supervisor, list[Row]]:
    told: list[Row] = []
    deadline = time.time() + seconds
    return Supervisor(out, scale="tiny", deadline=deadline, lock=lock, report=told.append, root=root), told


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_rows_that_crash_hang_or_lose_the_gpu_cost_no_other(out: Path, root: Path, lock: int) -> None:
    work, told = supervisor(out, root, lock)
    order = ["exit", "first", "killed", "lost", "hang", "last"]
    work.run("chapter", ids(*order), seconds=3)
    rows = read_rows(out / "rows.jsonl")
    assert names(rows) == names(told) == order
    assert {name: (row.outcome, row.reason) for name, row in zip(order, rows, strict=True)} == {
        "exit": ("failed", "the process ended with exit code 3"),
        "first": ("measured", None),
        "killed": ("failed", "the process was killed by SIGKILL"),
        "lost": ("failed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        "hang": ("failed", "took longer than 3 s"),
        "last": ("measured", None),
    }
    assert not is_there(int((root / "rows" / "child").read_text()))
    log = (out / "logs" / "chapter.log").read_text()
    assert 'test_some.py", line' in log  # where the row hung
    assert "in test_hang" in log


def test_time_is_kept(out: Path, root: Path, lock: int, monkeypatch: pytest.MonkeyPatch) -> None:
    work, told = supervisor(out, root, lock, seconds=-1)
    work.run("chapter", ids("first"), seconds=5)
    assert read_lines(out / "rows.jsonl") == told == []
    # A row that runs at the deadline may go on for a while, and is then to be run again: it has not failed.
    monkeypatch.setattr(supervise, "OVERTIME", 0.0)
    work, told = supervisor(out, root, lock)

    def end_soon(row: Row) -> None:
        told.append(row)
        work.deadline = time.time() + 0.5

    work.report = end_soon
    work.run("chapter", ids("first", "hang", "last"), seconds=60)
    assert names(told) == names(read_rows(out / "rows.jsonl")) == ["first"]
    assert read_lines(out / "rows.jsonl")[-1].outcome == "stopped"


def test_a_process_that_cannot_be_ended_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KILLED", 0.1)
    monkeypatch.setattr(processes, "_signal_group", lambda group, number: None)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        processes.end(process, politely=False)
        assert process.returncode is None
        process.kill()


def test_a_suite_that_cannot_be_loaded_fails_its_rows_once(out: Path, root: Path, lock: int) -> None:
    (root / "rows" / "test_some.py").write_text("import nothing_of_this_name\n")
    work, told = supervisor(out, root, lock)
    work.run("chapter", ids("first", "last"), seconds=5)
    assert names(told) == ["first", "last"]
    assert all(row.reason == "pytest did not find it" for row in told)


def options(out: Path, **changes: Any) -> argparse.Namespace:
    arguments = parse(["--out", str(out), "--scale", "tiny"])
    for name, value in changes.items():
        setattr(arguments, name, value)
    return arguments


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Campaigns without ceilings and pages; a list of what was asked for."""
    asked: list[str] = []
    monkeypatch.setattr(record, "commit", lambda: COMMIT)  # somebody may be editing
    monkeypatch.setattr(Run, "_ceilings", lambda run: asked.append("ceilings") or {"copy_bytes_per_second": 1.0})
    monkeypatch.setattr(Run, "_page", lambda run, name, write: asked.append(name))
    return asked


def chapters(*patterns: str) -> tuple[Chapter, ...]:
    return tuple(Chapter(name, name, (rf"::test_{name}",), 30) for name in patterns)


def test_a_campaign_goes_on_where_it_ended(
    out: Path, root: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    suites = Suites(root, "rows", (*chapters("last", "first"), Chapter("rest", "the rest", ("",), 30)), {})
    # The first session has time for one chapter, another process died while it wrote, and a row failed before.
    begun = record.begin(out, scale="tiny", machine=MACHINE, commit=COMMIT, fresh=False)
    begun.save(out / record.FILE)
    for row in ids("hang", "lost", "exit"):
        append(out / record.ROWS, Row(row, "skipped", "does not fit: 1 GB"))
    append(out / record.ROWS, Row(ids("killed")[0], "started"))
    with (out / record.ROWS).open("a") as file:
        file.write('{"row": "rows/te')

    assert run(options(out), suites=suites, machine=MACHINE) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "3 of 6 rows are there already" in printed
    assert [line.partition(": ")[0] for line in printed if line.startswith("[")] == [
        "[4/6] test_last",
        "[5/6] test_first",
        "[6/6] test_killed",
    ]
    assert quick[-2:] == ["plots", "table"]
    found = Campaign.load(out / record.FILE)
    assert found.not_reached == []
    assert names(found.rows) == ["first", "exit", "killed", "lost", "hang", "last"]
    times = {row.id: row.finished for row in found.rows}

    # Again: only what failed is tried again, and the rest is as it was.
    assert run(options(out), suites=suites, machine=MACHINE) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("[")] == [
        "[6/6] test_killed: failed: the process was killed by SIGKILL"
    ]
    again = Campaign.load(out / record.FILE)
    changed = [row for row in again.rows if times[row.id] != row.finished]
    assert names(changed) == ["killed"]
    assert again.seconds > found.seconds
    assert quick.count("ceilings") == 1


def test_what_time_stopped_comes_last_and_what_was_missing_is_tried_again(
    out: Path, root: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    suite = root / "rows" / "test_some.py"
    suite.write_text("def test_first(benchmark): pass\ndef test_missing(): pass\ndef test_large(): pass\n")
    suite.write_text(suite.read_text() + "def test_slow(): pass\ndef test_last(): pass\n")
    suites = Suites(root, "rows", (Chapter("rest", "the rest", ("",), 30),), {})
    record.begin(out, scale="tiny", machine=MACHINE, commit=COMMIT, fresh=False).save(out / record.FILE)
    for name, outcome, reason in (
        ("first", "failed", "ValueError"),
        ("missing", "skipped", "needs a package"),
        ("large", "skipped", "does not fit: 1 GB"),
        ("slow", "stopped", TIME),
    ):
        append(out / record.ROWS, Row(ids(name)[0], outcome, reason))  # type: ignore[arg-type]
    assert run(options(out), suites=suites, machine=MACHINE) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.partition("test_")[2].partition(":")[0] for line in printed] == ["last", "slow", "first", "missing"]
    assert printed[-1].startswith("[5/5]")


class Checked:
    """Checks that only note how long they would have, and say what they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, float] = {}
        self.before: dict[str, Any] = {}
        self.rows: list[tuple[list[str], float]] = []
        self.says: dict[str, dict[str, Any]] = {}
        self.obstacle: str | None = None
        self.checks = {name: self._check(name) for name in ("tour", "tests", "cold_start", "sanitizer")}
        monkeypatch.setattr(Run, "_rows", self._rows)

    def _check(self, name: str) -> Check:
        def run_it(folder: Path, deadline: float, before: dict[str, Any] | None) -> dict[str, Any]:
            self.given[name] = deadline - time.time()
            self.before[name] = before
            if name not in self.says:
                raise OSError("no such tool")
            return self.says[name]

        return Check(run_it, lambda: self.obstacle if name == "sanitizer" else None)

    def _rows(self, chapters: list[Chapter], deadline: float, passes: int = 3) -> None:
        number = sum(name.startswith("rows") for name in self.given)
        self.given[f"rows {number}"] = deadline - time.time()
        self.rows.append(([chapter.name for chapter in chapters], deadline - time.time()))


def test_checks_keep_to_their_time_and_do_not_stop_the_rows(
    out: Path, root: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = Checked(monkeypatch)
    part = {"passed": 5, "failed": 0, "complete": False}
    checked.says = {
        "tour": {"passed": 9, "failed": 0, "complete": True},
        "tests": part,
        "sanitizer": {"tools": {"memcheck": {"errors": 2}}},
    }
    some = (*chapters("first"), Chapter("early", "what comes first", ("",), 30, first=True))
    suites = Suites(root, "rows", some, checks=checked.checks)
    assert run(options(out, minutes=10.0, sanitize=True), suites=suites, machine=MACHINE) == 1
    said = capsys.readouterr().err
    assert "cold_start: no such tool" in said
    assert "sanitizer: 2 failed" in said
    order = ["tour", "rows 0", "tests", "rows 1", "cold_start", "sanitizer", "rows 2"]
    assert list(checked.given) == order
    assert [names for names, _ in checked.rows] == [["early"], ["first", "early"], ["first", "early"]]
    given = {name: seconds / 600 for name, seconds in checked.given.items()}
    kept = {"tour": 0.1, "rows 0": 0.53, "tests": 0.15, "rows 1": 0.68, "cold_start": 0.8, "sanitizer": 1, "rows 2": 1}
    assert given == pytest.approx(kept, abs=0.02)
    found = Campaign.load(out / record.FILE)
    assert found.checks["tests"] == part
    assert found.checks["cold_start"] is None

    # What is not complete goes on from what was found, and gives way to nothing worse; errors stay errors.
    checked.given.clear()
    checked.says["tests"] = {"passed": 4, "failed": 0, "complete": False}
    checked.says["cold_start"] = {"left_out": {}}
    assert run(options(out, minutes=10.0), suites=suites, machine=MACHINE) == 1
    assert list(checked.given) == ["rows 0", "tests", "rows 1", "cold_start", "rows 2"]
    assert checked.before["tests"] == part
    assert Campaign.load(out / record.FILE).checks["tests"] == part

    # Nothing is kept for what is complete. What failed before is made again when the rows have had their time.
    checked.given.clear()
    checked.says["tests"] = {"passed": 5, "failed": 1, "complete": True}
    run(options(out, minutes=10.0), suites=suites, machine=MACHINE)
    checked.given.clear()
    run(options(out, minutes=10.0), suites=suites, machine=MACHINE)
    assert list(checked.given) == ["rows 0", "rows 1", "rows 2", "tests"]
    assert checked.given["rows 0"] == pytest.approx(600, abs=12)

    # With --only nothing is checked.
    checked.given.clear()
    run(options(out, only=["first"]), suites=suites, machine=MACHINE)
    assert [names for names, _ in checked.rows[-3:]] == [[], ["first"], ["first"]]
    assert list(checked.given) == ["rows 0", "rows 1", "rows 2"]


def test_nothing_is_kept_for_a_sanitizer_that_is_not_there(
    out: Path, root: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Checked(monkeypatch)
    checked.obstacle = "no compute-sanitizer"
    whole = {"failed": 0, "complete": True}
    absent = {"available": False, "reason": checked.obstacle}
    checked.says = {"tour": whole, "tests": whole, "cold_start": {"left_out": {}}, "sanitizer": absent}
    suites = Suites(root, "rows", checks=checked.checks)
    assert run(options(out, minutes=10.0, sanitize=True), suites=suites, machine=MACHINE) == 0
    assert checked.given["cold_start"] == pytest.approx(600, abs=12)
    assert Campaign.load(out / record.FILE).checks["sanitizer"] == absent


def test_a_campaign_of_other_code_is_measured_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.begin(out, scale="tiny", machine=MACHINE, commit=COMMIT, fresh=False).save(out / record.FILE)
    append(out / record.ROWS, Row("a", "measured"))
    other = record.begin(out, scale="tiny", machine=MACHINE, commit={**COMMIT, "sources": "others"}, fresh=False)
    assert other.ceilings is None
    assert read_rows(out / record.ROWS) == []
    assert names(read_rows(out / "rows-before.jsonl")) == [""]
    assert "other code" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "now", "kept"), [("1.5", "1.5", True), (None, "1.5", True), ("1.5", "1.6", False), ("1.5", None, False)]
)
def test_another_version_of_a_peer_is_other_code(
    out: Path, before: str | None, now: str | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "versions", lambda: {"monai": before})
    record.begin(out, scale="tiny", machine=MACHINE, commit=COMMIT, fresh=False).save(out / record.FILE)
    append(out / record.ROWS, Row("a", "measured"))
    monkeypatch.setattr(record, "versions", lambda: {"monai": now})
    campaign = record.begin(out, scale="tiny", machine=MACHINE, commit=COMMIT, fresh=False)
    assert campaign.versions == {"monai": now}
    assert (out / record.ROWS).exists() == kept


@pytest.mark.parametrize(
    ("scale", "machine"), [("cpu", MACHINE), ("tiny", {**MACHINE, "processor": "another"}), ("tiny", {"gpu": "a GPU"})]
)
def test_another_machine_or_scale_is_refused(out: Path, scale: str, machine: dict[str, Any]) -> None:
    record.begin(out, scale="tiny", machine=MACHINE, commit=COMMIT, fresh=False).save(out / record.FILE)
    with pytest.raises(InputError, match="another machine or scale"):
        record.begin(out, scale=scale, machine=machine, commit=COMMIT, fresh=False)
    fresh = record.begin(out, scale=scale, machine=machine, commit=COMMIT, fresh=True)
    assert (fresh.scale, fresh.machine) == (scale, machine)


DRIVER = """
import sys
from pathlib import Path
from bench.campaign import __main__ as campaign

campaign.Run._ceilings = lambda run: None
suites = campaign.Suites(Path(sys.argv[1]), "rows", checks={})
sys.exit(campaign.run(campaign.parse(["--out", sys.argv[2], "--scale", "tiny"]), suites=suites, machine={}))
"""


def test_a_signal_stops_everything_and_loses_nothing(out: Path, root: Path) -> None:
    for name in ("exit", "killed", "lost"):
        suite = root / "rows" / "test_some.py"
        suite.write_text(suite.read_text().replace(f"test_{name}", f"no_{name}"))
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root), str(out)],
        env=environment("tiny"),
        stderr=subprocess.PIPE,
        text=True,
    )
    child = root / "rows" / "child"
    wait_for(child.exists)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on" in said
    found = Campaign.load(out / record.FILE)
    assert names(found.rows) == ["first"]
    assert found.not_reached == ids("hang", "last")
    assert found.rows[0].extra_info is not None
    assert not is_there(int(child.read_text()))
    assert not is_there(found.rows[0].extra_info["process"])
    assert (out / "campaign.md").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_signals_wait_for_what_must_not_be_divided() -> None:
    reached = []

    def divided() -> None:
        with supervise.stopping(), supervise.undivided():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            reached.append("the end")

    with pytest.raises(supervise.Stopped):
        divided()
    assert reached


def test_a_folder_is_for_one_campaign(out: Path) -> None:
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another campaign"), supervise.alone(out):
            pass
    with supervise.alone(out):
        pass


@pytest.fixture(scope="module")
def rows_of_a_gpu() -> list[str]:
    return collect_rows("gpu")


def test_every_row_has_a_chapter_and_every_chapter_rows(rows_of_a_gpu: list[str]) -> None:
    found = plan.sort(rows_of_a_gpu)
    assert sorted(row for rows in found.values() for row in rows) == sorted(rows_of_a_gpu)
    assert [name for name, rows in found.items() if not rows] == []
    early = ("autoencoder", "norm-act", "losses", "decoding", "generation", "whole-step", "flow")
    assert [row for name in early for row in found[name] if "compiled" in row] == []
    assert list(found)[: len(early)] == list(early)


def test_what_may_never_end_comes_late_and_what_decides_a_target_early(rows_of_a_gpu: list[str]) -> None:
    found = plan.sort(rows_of_a_gpu)
    slow = [row for row in rows_of_a_gpu if "monai" in row and "compiled" in row]
    assert sorted(found["monai-compiled"]) == sorted(slow)
    assert list(found)[-2:] == ["monai-compiled", "rest"]
    several = [row for row in rows_of_a_gpu if "norm_act" in row and "bfloat16" in row and "+backward" in row]
    assert sorted(found["norm-act"]) == sorted(row for row in several if "compiled" not in row)
    kinds = ("test_norm_act", "paper.*VAD", "VAD", "ours", r"test_blocks\.py::test_training_step", "")
    order = [next(n for n, kind in enumerate(kinds) if re.search(kind, row)) for row in found["compiled"]]
    assert order == sorted(order)
    assert set(order) == set(range(len(kinds)))


def test_ours_is_measured_before_its_peers(rows_of_a_gpu: list[str]) -> None:
    first = plan.sort(rows_of_a_gpu)["autoencoder"]
    ours = [row for row in first if "[ours" in row]
    assert ours
    assert first[: len(ours)] == ours


def test_a_row_without_a_chapter_is_an_error() -> None:
    with pytest.raises(ValueError, match="no chapter for a"):
        plan.sort(["a"], CHAPTERS[:1])


@pytest.mark.parametrize(
    "arguments",
    [["--minutes", "-1"], ["--minutes", "many"], ["--only", "nothing"], ["--scale", "huge"], ["elsewhere"]],
)
def test_a_wrong_option_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")


def test_where_a_campaign_goes() -> None:
    assert default_out("tiny", MACHINE).parts[-2:] == ("runs", "campaign-tiny")
    card = {"gpu": "NVIDIA GeForce RTX 3090"}
    assert default_out("gpu", card).parts[-3:] == ("bench", "results", "campaign-rtx-3090")
    assert default_out("tiny", card).parts[-2:] == ("runs", "campaign-tiny")


def test_a_record_is_read_as_it_was_written(out: Path) -> None:
    row = Row("a", "measured", finished=1.0, seconds=2.0, stats={"median": 1e-3}, extra_info={"n": 1}, gpu=None)
    written = Campaign("tiny", MACHINE, {"id": "1", "dirty": False, "sources": "2"}, {"monai": None}, rows=[row])
    written.save(out / record.FILE)
    assert Campaign.load(out / record.FILE) == written
    content = json.loads((out / record.FILE).read_text())
    assert (content["kind"], content["version"], content["rows"][0]["row"]) == ("campaign", 1, "a")
    (out / record.FILE).write_text("{}")
    with pytest.raises(InputError, match="not a campaign"):
        Campaign.load(out / record.FILE)


def test_the_code_is_known_by_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert record.commit()["sources"] == record.commit()["sources"]
    monkeypatch.setattr(record, "ROOT", tmp_path)
    for folder in ("bench/campaign", "kernels/deep"):
        (tmp_path / folder).mkdir(parents=True)
    seen = [record.commit()]
    assert (seen[0]["id"], seen[0]["dirty"]) == ("unknown", False)  # no clone
    for file in ("bench/test_a.py", "kernels/deep/some.json", "bench/campaign/plan.py"):
        (tmp_path / file).write_text("")
        seen.append(record.commit())
    digests = [commit["sources"] for commit in seen]
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]


def test_a_row_is_told_in_a_few_words() -> None:
    row = Row("a", "measured", stats={"median": 0.0123})
    assert result(row) == "12.3 ms"
    assert result(replace(row, outcome="skipped", stats=None, reason="does not fit")) == "skipped: does not fit"

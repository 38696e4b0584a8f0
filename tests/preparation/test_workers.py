"""Processes that do things side by side: every item gets its answer, whatever becomes of the process that has it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from decovae.errors import InputError, RunError
from decovae.preparation import worker, workers
from decovae.preparation.workers import for_each
from tests.preparation.tasks import do

ROOT = Path(__file__).resolve().parents[2]
SQUARES = [("square", value) for value in range(20)]


def results(tasks: list[tuple[str, object]], *, processes: int = 2) -> dict[tuple[str, object], object]:
    return dict(for_each(do, tasks, workers=processes))


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_item_is_answered(processes: int) -> None:
    tasks = [*SQUARES, ("refuse", "no"), ("fail", "oh"), ("no memory", "")]
    answers = results(tasks, processes=processes)
    assert {value: answers["square", value] for _, value in SQUARES} == {value: value**2 for value in range(20)}
    assert len(answers) == len(tasks)
    assert isinstance(answers["refuse", "no"], InputError)
    assert str(answers["refuse", "no"]) == "no"
    assert "ZeroDivisionError: oh" in str(answers["fail", "oh"])
    assert "There is not enough memory" in str(answers["no memory", ""])


def test_a_death_takes_no_other_item_with_it(tmp_path: Path) -> None:
    dying: list[tuple[str, object]] = [("die", signal.SIGKILL), ("die", signal.SIGSEGV), ("leave", None)]
    once = "die once", tmp_path / "marker"
    answers = results([SQUARES[0], *dying, once, *SQUARES[1:]])
    assert [answers[square] for square in SQUARES] == [value**2 for value in range(20)]
    assert answers[once] == "survived"
    killed, crashed, left = (str(answers[task]) for task in dying)
    assert all(isinstance(answers[task], InputError) for task in dying)
    assert "was killed, probably for want of memory" in killed
    assert "was ended by SIGSEGV" in crashed
    assert "ended with code 3" in left


@pytest.mark.parametrize("processes", [0, 1])
def test_what_cannot_go_on_ends_everything(processes: int) -> None:
    with pytest.raises(RunError, match="disk"):
        results([*SQUARES, ("give up", "disk")], processes=processes)


@pytest.mark.parametrize("processes", [0, 1])
def test_torch_is_single_threaded(processes: int) -> None:
    before = torch.get_num_threads()
    assert results([("threads", None)], processes=processes) == {("threads", None): 1}
    assert torch.get_num_threads() == before


def test_ctrl_c_is_not_heard() -> None:
    assert results([("deaf", None)], processes=1) == {("deaf", None): True}
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_no_process_is_left_over(tmp_path: Path) -> None:
    answers = for_each(do, [("process", 0), ("sleep", tmp_path / "sleeper")], workers=2)
    _, idle = next(answers)
    assert isinstance(idle, int)
    wait_until((tmp_path / "sleeper").exists)
    wait_until(lambda: (tmp_path / "sleeper").read_text() != "")
    answers.close()  # type: ignore[attr-defined]
    assert not is_alive(idle)
    assert not is_alive(int((tmp_path / "sleeper").read_text()))


PROGRAM = """
import sys
from decovae.preparation.workers import for_each
from tests.preparation.tasks import do
if __name__ == "__main__":
    list(for_each(do, [("sleep", sys.argv[1])], workers=1))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "sleeper"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as parent:
        wait_until((tmp_path / "sleeper").exists)
        wait_until(lambda: (tmp_path / "sleeper").read_text() != "")
        if end == signal.SIGINT:
            os.killpg(parent.pid, end)  # as a terminal does
        else:
            os.kill(parent.pid, end)
        _, printed = parent.communicate(timeout=60)
    wait_until(lambda: not is_alive(int((tmp_path / "sleeper").read_text())))
    if end == signal.SIGINT:
        assert printed.count("Traceback") == 1, printed  # only the one that was started by hand hears Ctrl-C


def test_a_process_that_cannot_begin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_serve", os.getpid)
    with pytest.raises(RunError, match="ended with code 1 before it began"):
        results(SQUARES[:1], processes=1)


def test_workers_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for free, expected in [(0, 1), (5 << 30, 5), (1 << 40, 64)]:
        monkeypatch.setattr(workers, "_free_memory", lambda free=free: free)
        assert workers.usual_workers() == expected

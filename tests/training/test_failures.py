"""Processes that hang, die or fail: who did it is named, and the others do not wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import survival
from bench.processes import ROOT, environment, free_port
from decovae.process import lost_another

PROGRAM = """
import os, signal, sys, time
from decovae.process import leave
from decovae.runtime import start_runtime
from decovae.training.command_line import exit_code
from decovae.training.watch import Watch

def run():
    with start_runtime("cpu") as runtime, Watch(runtime, 2.0) as watch:
        for step in range(1, 4):
            watch.at("data", step=step)
            if step == 3 and runtime.rank == {rank}:
                {deed}
            watch.at("agreement", step=step)
            runtime.gather(step)
    print("finished", flush=True)

leave(exit_code(run, stopped=""))
"""


def run(deed: str, *, world: int = 2, rank: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """What becomes of processes of which one does a deed at step 3; stopped ones are killed in the end."""
    port = free_port()
    program = PROGRAM.format(rank=rank, deed=deed)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**environment(), "OMP_NUM_THREADS": "1", **survival.place_of(each, world, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in range(world)
    ]
    # The others end by themselves; who did it may be stopped, and has nothing more to say then.
    ended = {each: process.communicate(timeout=120) for each, process in enumerate(processes) if each != rank}
    if "SIGSTOP" in deed:
        processes[rank].kill()
    ended[rank] = processes[rank].communicate(timeout=120)
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *ended[each])
        for each, process in enumerate(processes)
    ]


def test_a_process_that_hangs_is_named_with_its_place_and_stacks() -> None:
    ended = run("time.sleep(1000)", world=3)
    assert [process.returncode for process in ended] == [1, 1, 1]
    said = "".join(process.stderr for process in ended)
    assert said.count("error: the run hangs") == 1
    assert said.count("process 1 (node ") >= 1
    assert 'is behind: in "data" of step 3' in said
    assert 'processes 0, 2 wait in "agreement" of step 3' in said
    assert "Stacks of process 1" in ended[1].stderr
    assert "in run" in ended[1].stderr  # the frame in which it sleeps
    assert "Stacks" not in ended[0].stderr + ended[2].stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["the one with the store", "another"])
def test_a_process_that_does_not_answer_is_named(rank: int) -> None:
    ended = run("os.kill(os.getpid(), signal.SIGSTOP)", rank=rank)
    other = ended[1 - rank]
    assert other.returncode == 1
    assert "error: the run hangs" in other.stderr
    assert f"process {rank} (node " in other.stderr
    assert "has not answered for" in other.stderr


def test_a_process_alone_that_hangs_says_where() -> None:
    (ended,) = run("time.sleep(1000)", world=1, rank=0)
    assert ended.returncode == 1
    assert 'stands still: in "data" of step 3' in ended.stderr
    assert "Stacks of process 0" in ended.stderr


@pytest.mark.slow
def test_what_takes_long_is_waited_for_where_that_is_said() -> None:
    ended = run("watch.at('data', step=step, patience=60.0); time.sleep(4)")
    assert [(process.returncode, process.stdout) for process in ended] == [(0, "finished\n")] * 2


def test_who_lost_another_process_says_so_in_one_sentence() -> None:
    other, _ = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert other.returncode == 1
    assert len(other.stderr.strip().splitlines()) == 1
    assert "lost another process of this run" in other.stderr
    assert "continues from its last checkpoint" in other.stderr


def test_who_really_failed_keeps_its_own_error() -> None:
    ended = run("raise ZeroDivisionError('here')")
    assert [process.returncode for process in ended] == [1, 1]
    assert "ZeroDivisionError: here" in ended[1].stderr
    assert "ZeroDivisionError" not in ended[0].stderr
    assert "lost another process" in ended[0].stderr


def raised(*errors: Exception) -> Exception:
    """The last of errors, each raised while the one before was handled."""
    before: Exception | None = None
    for error in errors:
        error.__context__ = before
        before = error
    return errors[-1]


def test_an_error_is_another_s_where_it_began_with_a_lost_connection() -> None:
    gone = RuntimeError("[tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4242.")
    assert lost_another(gone) == "Connection closed by peer"
    assert lost_another(raised(gone, OSError("a file that could not be closed"))) is not None
    assert lost_another(raised(ValueError("a bug"), gone)) is None
    assert lost_another(OSError("Broken pipe")) is None  # of a pager, say
    assert lost_another(RuntimeError("shape mismatch")) is None


def test_the_folder_tells_what_a_run_was_at(tmp_path: Path) -> None:
    assert survival.inside(tmp_path) == "start"
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 3, "l1": 1}\n')
    assert survival.inside(tmp_path) == "training"
    log.write_text('{"step": 4, "l1": 1}\n{"st')
    assert survival.inside(tmp_path) == "validation"
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    assert survival.inside(tmp_path) == "checkpoint write"

"""How a process ends: with its code and all it had to say; among others without what could abort a finished run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LEAVES = """
import atexit, concurrent.futures, time
from decovae.process import leave
atexit.register(print, "handlers ran")
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(lambda: (time.sleep(0.3), print("a thread's last words")))
print("not yet flushed")
leave(3)
"""

LEFT_IN_THE_MIDDLE = """
import torch
from decovae.data.loading import Loader
from decovae.process import leave
from decovae.training.command_line import exit_code
from decovae.training.interruption import leave_signals_to_the_parent

kept = []

def train():
    loader = Loader(range(1000), [[place] for place in range(1000)], workers=2, prefetch=2,
                    device=torch.device("cpu"), at_start=leave_signals_to_the_parent)
    kept.append(iter(loader._batches))
    next(kept[0])
    raise {error}

leave(exit_code(train, stopped="stopped"))
"""

SAID = "not yet flushed\na thread's last words\nhandlers ran\n"

ABORTS_AT_TEARDOWN = """
import os
class Aborts:
    def __del__(self, abort=os.abort):
        abort()
kept = Aborts()
"""


def run(program: str, *, world: int, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "WORLD_SIZE": str(world), "PYTHONUNBUFFERED": ""},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=100,
    )


def test_alone_it_leaves_as_any_process_does() -> None:
    done = run(LEAVES, world=1)
    assert (done.returncode, done.stdout) == (3, SAID), done.stderr


def test_among_others_nothing_is_taken_apart() -> None:
    assert run(ABORTS_AT_TEARDOWN, world=2).returncode == -6  # what is guarded against
    done = run(ABORTS_AT_TEARDOWN + LEAVES, world=2)
    assert (done.returncode, done.stdout) == (3, SAID), done.stderr


def test_among_others_a_failure_waits_for_nothing() -> None:
    """A thread that talks to processes that are gone would hold it up for hours."""
    program = "import threading; from decovae.process import leave; print('said')\n"
    done = run(program + "threading.Thread(target=threading.Event().wait).start(); leave(1)", world=2)
    assert (done.returncode, done.stdout) == (1, "said\n"), done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ('torch.OutOfMemoryError("CUDA out of memory")', 1, "OutOfMemoryError: CUDA out of memory"),
        ("KeyboardInterrupt", 130, "error: stopped"),
    ],
)
def test_loaders_that_an_error_left_behind_do_not_hold_up_the_end(error: str, code: int, said: str) -> None:
    """They leave signals to this process, which would ask them to stop by one, and wait."""
    done = run(LEFT_IN_THE_MIDDLE.format(error=error), world=1)
    assert done.returncode == code
    assert done.stderr.strip().endswith(said)
    assert done.stderr.count("Error") == (code == 1)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("print('short')", 141),
        ("print('long' * 10000)", 141),
        ("(print('help'), sys.exit(0))", 141),
        ("(print('some'), 3)[1]", 3),
        ("(print('some'), open('/none'))", 1),
    ],
)
def test_nobody_reads_what_is_printed(action: str, code: int) -> None:
    program = "import sys; from decovae.process import leave; from decovae.training.command_line import exit_code\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = run(program + f"leave(exit_code(lambda: {action}, stopped=''))", world=1, stdout=writing)
    os.close(writing)
    assert done.returncode == code
    assert "BrokenPipe" not in done.stderr
    assert bool(done.stderr) is (code == 1)

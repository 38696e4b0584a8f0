"""How a process ends: with its code and all it had to say; among others without what could abort a finished run."""

from __future__ import annotations

import os
import subprocess
import sys

LEAVES = """
import atexit, concurrent.futures, time
from decovae.process import leave
atexit.register(print, "handlers ran")
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(lambda: (time.sleep(0.3), print("a thread's last words")))
print("not yet flushed")
leave(3)
"""

SAID = "not yet flushed\na thread's last words\nhandlers ran\n"

ABORTS_AT_TEARDOWN = """
import os
class Aborts:
    def __del__(self, abort=os.abort):
        abort()
kept = Aborts()
"""


def run(program: str, *, world: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "WORLD_SIZE": str(world)},
        capture_output=True,
        text=True,
        check=False,
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

"""Processes that measure or check something: what they find in their environment, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FAREWELL = 5.0
"""Seconds between asking a process to end and ending it."""

KILLED = 30.0
"""Seconds that a killed process has to be gone; one that waits in a driver may never be, and is left behind."""


def environment() -> dict[str, str]:
    """This process's, in which this project is found first wherever a process runs.

    A process that is started is no worker of pytest-xdist, in which nothing would be timed.
    """
    inherited = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *inherited]),
    }


def free_port() -> int:
    """A port of this machine that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs, as far as the system tells (Linux)."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])  # behind the name, which may hold anything
            parents.setdefault(parent, []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def end(process: subprocess.Popen[bytes], *, politely: bool = True) -> None:
    """End a process of its own session and all that it started, those with sessions of their own too.

    One that cannot be ended is waited for no longer than `KILLED`.
    """
    if process.poll() is not None:
        _signal_group(process.pid, signal.SIGKILL)
        return
    others = _descendants(process.pid)
    if politely:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(FAREWELL)
    _signal_group(process.pid, signal.SIGKILL)
    for pid in others:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(group, number)

"""How a process of this project ends."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

UNHEARD = 128 + signal.SIGPIPE
"""The exit code of a process whose output nobody reads to its end, ``decovae … | head`` for one: a shell's for those
that die of it."""

GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "Timed out waiting",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
"""What gloo and NCCL say when a process that they talk to is gone."""


def leave(code: int) -> NoReturn:
    """End this process with an exit code, once what it had to do is done and its files are closed.

    One of several (torchrun's) ends without taking the interpreter apart: a thread of the process group that lets go
    of its last tensor meanwhile would find no interpreter to tell, and abort a finished run. With code 1, which is that
    of what could not go on, or with `UNHEARD`, it waits for nothing: its threads may wait for processes that are gone.
    """
    nobody_listens()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    if code not in (1, UNHEARD):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as leaving otherwise would,
        atexit._run_exitfuncs()  # and does what else is to be done last
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def heard(action: Callable[[], int]) -> int:
    """What ``action`` returns, once all that it printed is out; instead of 0, `UNHEARD` if whoever was to read that has
    gone, and also if it was cut short by that."""
    code = 0
    try:
        try:
            code = action()
        except SystemExit:  # after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not nobody_listens():
            raise
        return code or UNHEARD
    return code


def nobody_listens() -> bool:
    """Whether whoever was to read what this process prints has gone; what is printed from then on goes nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            file = stream.fileno()
        except (AttributeError, OSError, ValueError):  # is no file, or is closed
            continue
        poll = select.poll()
        poll.register(file, 0)  # errors are always told
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file)
            os.close(nowhere)
            gone = True
    return gone


def end_loaders() -> None:
    """End the loader processes of a command that has ended.

    They leave signals to this process, which at its own end asks them to stop by one and then waits for ever. A loader
    does not end with the error that it was left by: whoever has the traceback still has the loader.
    """
    loaders = [process for process in multiprocessing.active_children() if process.daemon]
    if not loaders:
        return
    in_main = threading.current_thread() is threading.main_thread()
    # torch's handler takes the end of a loader for an accident.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    for process in loaders:
        process.kill()
        process.join()
    if in_main:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def lost_another(error: BaseException) -> str | None:
    """How an error says that another process of this run is gone, or None if that is not where it began."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    if not isinstance(error, RuntimeError):
        return None
    if type(error).__name__ in ("DistNetworkError", "DistStoreError", "_DistNetworkError", "_DistStoreError"):
        return str(error).strip().splitlines()[0] if str(error).strip() else "no connection"
    return next((phrase for phrase in GONE if phrase in str(error)), None)


def lost_loader(error: BaseException) -> bool:
    """Whether an error says that a loader process of this one was killed: torch raises it wherever this one is then."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")

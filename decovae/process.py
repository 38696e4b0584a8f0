"""How a process of this project ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

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
    of what could not go on, it waits for nothing: its threads may wait for processes that are gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    if code != 1:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as leaving otherwise would,
        atexit._run_exitfuncs()  # and ends loader processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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

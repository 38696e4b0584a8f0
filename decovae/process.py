"""How a process of this project ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code, once what it had to do is done and its files are closed.

    One of several (torchrun's) ends without taking the interpreter apart: a thread of the process group that lets go
    of its last tensor meanwhile would find no interpreter to tell, and abort a finished run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as leaving otherwise would,
    atexit._run_exitfuncs()  # and ends loader processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

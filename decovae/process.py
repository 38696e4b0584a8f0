"""How a process of this project ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code, once what it had to do is done and its files are closed.

    One of several (torchrun's) ends without taking the interpreter apart: a thread of the process group that lets go
    of its last tensor meanwhile would find no interpreter to tell, and abort a finished run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    atexit._run_exitfuncs()  # ends loader processes and waits for threads, as leaving otherwise would
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""What processes are given to do in tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from decovae.errors import InputError, RunError
from decovae.preparation.candidates import Candidate
from decovae.preparation.journal import Entry
from decovae.preparation.run import prepare_one
from decovae.preparation.volume import Preparation


def do(task: tuple[str, object]) -> object:
    """Whatever its name says."""
    what, value = task
    if what == "square":
        assert isinstance(value, int)
        return value * value
    if what == "die":
        assert isinstance(value, signal.Signals)
        os.kill(os.getpid(), value)
    if what == "leave":
        os._exit(3)
    if what == "die once":
        return die_once(Path(str(value)))
    if what == "threads":
        return torch.get_num_threads()
    if what == "deaf":
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if what == "process":
        return os.getpid()
    if what == "sleep":
        Path(str(value)).write_text(str(os.getpid()))
        time.sleep(600)
    raise {"refuse": InputError, "give up": RunError, "fail": ZeroDivisionError, "no memory": MemoryError}[what](value)


def die_once(marker: Path) -> str:
    """Die at the first try: memory was short because of another's volume."""
    if marker.exists():
        return "survived"
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def prepare_or_die(candidate: Candidate, *, preparation: Preparation, folder: Path) -> Entry:
    """Prepare a volume, unless it is more than a process can bear."""
    if "deadly" in candidate.source:
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_one(candidate, preparation=preparation, folder=folder)

"""One process that answers for others, and how it is started so that it harms nobody."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from decovae.errors import InputError, RunError

Item = TypeVar("Item")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Death:
    """What comes in place of an answer when a process has died.

    Attributes:
        how: to follow "its process".
    """

    def __init__(self, exit_code: int | None) -> None:
        self.how = f"ended with code {exit_code}"
        if exit_code is not None and exit_code < 0:
            with contextlib.suppress(ValueError):
                self.how = f"was ended by {signal.Signals(-exit_code).name}"
        if exit_code == -signal.SIGKILL:
            self.how = "was killed, probably for want of memory"


def attempt(function: Callable[[Any], Any], item: Any) -> Any:
    """The result, or the error in its place: any error, because a volume that nobody foresaw must not end the rest."""
    try:
        return function(item)
    except (InputError, RunError) as error:
        return error
    except MemoryError:
        return InputError("There is not enough memory for it.")
    except Exception as error:
        return InputError(
            f"It failed in a way that nobody foresaw ({type(error).__name__}: {error}); please report it."
        )


class Worker(Generic[Item]):
    """A process that answers one item at a time."""

    def __init__(self, function: Callable[[Item], Any]) -> None:
        context: Any = multiprocessing.get_context(_start_method())
        self.connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        with _alone(), _deaf():
            process.start()
        theirs.close()
        self.process = process

    def give(self, item: Item) -> None:
        """Send it something to do. That it may be dead already shows when it should answer."""
        with contextlib.suppress(OSError):
            self.connection.send(item)

    def answer(self) -> Any:
        """What it answers, or its `Death`."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.end()
            return Death(self.process.exitcode)

    def end(self) -> None:
        """End the process, whatever it is at."""
        self.connection.close()
        self.process.join(0.5)  # it ends by itself, with its own exit code, unless it is at work
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """What a process does: answer, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # if memory runs out, this process goes and not the one that keeps the books
        Path("/proc/self/oom_score_adj").write_text("500")
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)
        while True:
            connection.send(attempt(function, connection.recv()))


def _end_with(sentinel: int) -> None:
    """End this process with the one that started it, or it would write behind a successor's back."""
    wait([sentinel])
    os._exit(1)


def _start_method() -> str:
    """Never a fork of this process, which may hold threads and locks; a server to fork from makes starts cheap."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["decovae.preparation.volume"])
    return "forkserver"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """What is started meanwhile computes on one thread."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """What is started meanwhile does not hear Ctrl-C from its first moment on: it is this process that ends others."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would be started meanwhile, and undo this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

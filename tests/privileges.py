"""What a process may not read, even where the tests' own may read everything."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOBODY = 65534


@contextmanager
def folder_of_all() -> Iterator[Path]:
    """A new folder that everybody may look into: those that pytest makes are their owner's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for name, children, _ in os.walk(folder):
            for child in children:
                if not os.path.islink(os.path.join(name, child)):
                    os.chmod(os.path.join(name, child), 0o700)
        shutil.rmtree(folder)


def unprivileged(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result in a process that is bound by permissions, or the error that it raised."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _answer(connection: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        connection.send(function(*arguments))
    except Exception as error:
        connection.send(error)
